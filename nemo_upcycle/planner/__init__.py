"""Find a parallel mapping for a model and GPUs: memory, step time, search."""
