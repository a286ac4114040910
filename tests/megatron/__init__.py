"""The front for Megatron-LM and Megatron-Bridge, on Megatron-Core 0.18 or newer."""
