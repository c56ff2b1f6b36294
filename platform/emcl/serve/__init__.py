"""A page to search one's own videos in, and an HTTP API beside it."""
