"""The training loop, optimiser groups, checkpoints and exports."""
