"""Training data: a sample corpus, a tokenizer and Megatron's indexed datasets."""
