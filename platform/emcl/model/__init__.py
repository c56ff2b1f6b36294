"""CLIP towers, temporal encoder, pooling and similarity: torch modules that do not know of ranks."""
