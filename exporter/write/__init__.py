"""Checkpoints, written while the source streams by."""
