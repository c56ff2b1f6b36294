"""Searches moments in a user's videos with a trained model."""
