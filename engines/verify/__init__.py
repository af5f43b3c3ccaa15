"""Parity with the checkpoint, and self-checks of an engine."""
