"""Which mapping for this model on so many GPUs of this kind: memory, step time, search."""
