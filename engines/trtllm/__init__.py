"""Engines of TensorRT-LLM."""
