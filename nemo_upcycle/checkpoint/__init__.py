"""A dense checkpoint as names, shapes, dtypes and `read(name, slice)`."""

from nemo_upcycle.checkpoint.huggingface import HuggingFaceCheckpoint, TensorInfo, read_config

__all__ = ["HuggingFaceCheckpoint", "TensorInfo", "read_config"]
