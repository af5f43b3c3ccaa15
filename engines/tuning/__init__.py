"""Acceptance and costs measured on an engine, and the tree that follows from them."""
