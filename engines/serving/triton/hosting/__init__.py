"""A real tritonserver on this machine: which one, how it is prepared, how it is started and ended."""
