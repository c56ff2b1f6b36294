"""Metrics, as pure functions on arrays."""
