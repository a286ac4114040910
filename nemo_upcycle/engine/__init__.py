"""Fills Megatron-Core's models: torch and Megatron-Core, and nothing above them."""
