"""Training with the whole model in the loop: joint, FSDP, quantization-aware."""
