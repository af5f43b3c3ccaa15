"""ONNX graphs of an export, read by ONNX's own rules: what their constants stand for, and whether their operators are the model's."""
