"""What an exporter and an engine agree on."""
