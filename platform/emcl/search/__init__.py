"""Finding moments of one's own videos with a trained model."""
