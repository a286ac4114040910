"""The check of a cluster: what upcycling promises, over the mappings that its ranks allow.

Needs Megatron-Core alone, so that the check works with NeMo 2 and with Megatron's own training.
"""
