"""A web page to search a user's videos, and an HTTP API."""
