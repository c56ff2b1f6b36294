"""Raw videos and benchmark files to shards, and the generated sample set."""
