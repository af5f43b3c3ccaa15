"""Checks of what was written, which share no code with what writes it."""
