"""Other runtimes in TensorRT's place, where there is no GPU."""
