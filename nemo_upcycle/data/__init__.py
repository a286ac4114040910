"""Makes training data: a sample corpus, a tokenizer and Megatron indexed datasets."""
