"""What a step costs on a GPU that is not here, from the model's shape and the data sheet: an estimate, and said to be one."""
