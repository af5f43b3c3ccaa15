"""Disk, memory and GPUs that an export will take, from headers alone."""
