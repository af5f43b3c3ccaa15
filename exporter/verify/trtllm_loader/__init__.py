"""What TensorRT-LLM's loader expects of a checkpoint, written from its specification."""
