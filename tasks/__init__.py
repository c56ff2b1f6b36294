"""The tasks: in `NAME.py` an nn.Module that owns its head; beside it how it is scored and what a report shows of it."""
