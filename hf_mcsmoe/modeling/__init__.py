"""What travels with a checkpoint: configuration, model and experts classes."""
