"""Acceptance and sampling, and the decoding loop that everything else is held against."""
