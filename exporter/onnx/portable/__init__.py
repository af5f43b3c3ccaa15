"""ONNX graphs of standard operators alone, for TensorRT and TensorRT-RTX."""
