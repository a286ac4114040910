"""Megatron-Core on CPU and gloo: its layers, and what is changed for it.

Importing this changes nothing. `enable()` does, and `cpu_layer_spec` calls it.
"""

from nemo_upcycle.engine.cpu.layers import MODEL_OVERRIDES, cpu_layer_spec
from nemo_upcycle.engine.cpu.patches import enable

__all__ = ["MODEL_OVERRIDES", "cpu_layer_spec", "enable"]
