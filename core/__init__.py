"""What knows nothing of Medusa: errors, threads, JSON, files."""
