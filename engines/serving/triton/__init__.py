"""Model repositories for Triton's Python backend."""
