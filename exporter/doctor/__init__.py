"""What is on this machine, and what works with it."""
