"""Model repositories for Triton's TensorRT-LLM backend."""
