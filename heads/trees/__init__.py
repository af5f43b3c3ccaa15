"""Medusa trees: their form, their measured acceptance and cost, and the search for the best one."""
