"""The tasks: one file each, an nn.Module that owns its head and says how it is trained and scored."""
