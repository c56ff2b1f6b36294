"""From shards to batches: sample schema, sampling order, decoding, transforms."""
