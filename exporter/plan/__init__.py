"""Which tensor goes where: pure plans, made from names and shapes alone."""
