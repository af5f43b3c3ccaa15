"""Engines behind one protocol, one decode loop, and the runner that proves speed-up and parity."""
