"""Megatron-Core on CPU and gloo: layers, and patches of torch and Megatron-Core.

Importing this package changes nothing; `enable()` applies the patches, and `cpu_layer_spec` calls
`enable()`.
"""

from nemo_upcycle.engine.cpu.layers import MODEL_OVERRIDES, cpu_layer_spec
from nemo_upcycle.engine.cpu.patches import enable

__all__ = ["MODEL_OVERRIDES", "cpu_layer_spec", "enable"]
