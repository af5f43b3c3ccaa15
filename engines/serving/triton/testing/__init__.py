"""A real tritonserver on this machine, for tests and benchmarks."""
