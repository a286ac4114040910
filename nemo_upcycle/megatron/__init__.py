"""The front end for Megatron-LM and Megatron-Bridge: a hook that upcycles, a config, metrics.

Knows neither NeMo nor Lightning. `upcycle` needs Megatron-Core alone; `gpt_model_config` needs the
`megatron.training` that Megatron-Core brings from 0.18 on.
"""

from nemo_upcycle.megatron.hook import upcycle
from nemo_upcycle.megatron.metrics import TrainingMetrics
from nemo_upcycle.megatron.model import gpt_model_config
from nemo_upcycle.megatron.router_warm_up import RouterWarmUp

__all__ = ["RouterWarmUp", "TrainingMetrics", "gpt_model_config", "upcycle"]
