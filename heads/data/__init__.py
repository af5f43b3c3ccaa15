"""Conversations that the base model itself wrote."""
