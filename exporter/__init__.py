"""Writers of TensorRT-LLM checkpoints and ONNX graphs, and the commands."""
