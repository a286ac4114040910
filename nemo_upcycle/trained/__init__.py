"""A trained model as tensors: opened, exported, compared with the dense model."""
