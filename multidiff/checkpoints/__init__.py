"""Saved models: the model folder, and models out of Lightning checkpoints and from the hub."""
