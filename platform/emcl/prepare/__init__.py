"""Makes shards from raw videos and benchmark files, and generates the sample set."""
