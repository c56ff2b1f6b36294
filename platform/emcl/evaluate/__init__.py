"""Scores a model on a split, and reports it: the driver, the tables, the pictures."""
