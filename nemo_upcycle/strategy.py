"""NeMo's Megatron strategy without two of its faults."""

from dataclasses import dataclass
from typing import Any

from megatron.core import distributed
from nemo import lightning as nl
from nemo.lightning import io


@dataclass
class DistributedDataParallelConfig(distributed.DistributedDataParallelConfig, io.IOMixin):
    """Megatron's config, made serialisable.

    NeMo writes the training context into every checkpoint, but cannot serialise Megatron's own
    class: it then warns "Failed to dump training context", and `llm.export_ckpt` cannot read the
    checkpoint.
    """


class MegatronStrategy(nl.MegatronStrategy):
    """NeMo's strategy without Megatron's timers.

    NeMo's ProgressPrinter prints them on rank 0 alone, but collecting them is an all-gather over
    all ranks: the next collective of the whole world, such as a checkpoint's, then never ends.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timers = None
