"""The runner: speed-up and parity of an engine, and the report."""
