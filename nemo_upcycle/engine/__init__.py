"""The engine that fills Megatron-Core's models; depends on torch and Megatron-Core only."""

from nemo_upcycle.engine.versions import mend

mend()
