"""Faults put into exports by machine, and the share of them that verify finds: ``python -m tests.faults``."""
