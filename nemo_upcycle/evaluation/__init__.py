"""Evaluation of trained models: lm-eval on any number of ranks, parity with the dense model."""
