"""Upcycle dense LLM checkpoints into Mixture-of-Experts models, online, inside NeMo."""

__version__ = "0.1.0"
