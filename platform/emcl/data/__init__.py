"""Shards to batches: the sample schema, the order, decoding, transforms."""
