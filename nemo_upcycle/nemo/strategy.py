"""NeMo's Megatron strategy without the fault in the timers, and with a check of the mapping."""

import os
import re
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from megatron.core.dist_checkpointing.core import CheckpointingException
from nemo import lightning as nl
from torch.distributed.checkpoint.api import CheckpointException

from nemo_upcycle.checkpoint.megatron_metadata import check_files
from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.errors import UpcyclingError


class MegatronStrategy(nl.MegatronStrategy):
    """NeMo's strategy without Megatron's timers.

    NeMo's ProgressPrinter prints the timers on rank 0 alone, but collecting them is an all-gather
    over all ranks. The next collective of all ranks, such as a checkpoint's, would hang.
    """

    # NeMo records the arguments in every checkpoint's context, by the constructor's signature.
    @wraps(nl.MegatronStrategy.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timers = None
        if "WORLD_SIZE" in os.environ:
            self.folding().validate(int(os.environ["WORLD_SIZE"]))

    def connect(self, model: pl.LightningModule) -> None:
        """Connect the model after checking the mapping.

        Raises:
            UpcyclingError: The model has experts, and TP is used without sequence parallelism.
        """
        has_experts = getattr(model.config, "num_moe_experts", None) is not None
        if has_experts and self.tensor_model_parallel_size > 1 and not self.sequence_parallel:
            raise UpcyclingError(
                f"tensor_model_parallel_size is {self.tensor_model_parallel_size} without "
                "sequence parallelism, which Megatron's MoE needs; set "
                "trainer.strategy.sequence_parallel=True."
            )
        super().connect(model)

    def load_checkpoint(self, checkpoint_path: Any, selective_restore: bool = False) -> Any:
        """Load a checkpoint.

        Raises:
            UpcyclingError: The checkpoint does not load into the model. The error replaces a page
                of tracebacks per rank.
        """
        try:
            return super().load_checkpoint(checkpoint_path, selective_restore)
        except (CheckpointingException, CheckpointException, RuntimeError) as error:
            _check_whole(Path(checkpoint_path))
            raise UpcyclingError(
                f"{checkpoint_path} cannot be loaded: {_cause(error)}. It is damaged, or of "
                "another model than the command says: give the architecture that the run began "
                "with, or another name for a new run."
            ) from error

    def folding(self) -> ParallelFolding:
        """Return the mapping in the strategy's arguments.

        Raises:
            UpcyclingError: The arguments contradict each other.
        """
        names = [field.name for field in fields(ParallelFolding)]
        values = {name: getattr(self, name) for name in names}
        if values["expert_tensor_parallel_size"] is None:  # Megatron's default is TP
            values["expert_tensor_parallel_size"] = self.tensor_model_parallel_size
        return ParallelFolding(**values)


def _check_whole(weights: Path) -> None:
    """Check the files of a checkpoint that could not be loaded.

    Raises:
        UpcyclingError: A file is incomplete.
    """
    try:
        check_files(weights)
    except UpcyclingError as error:
        raise UpcyclingError(
            f"{weights} cannot be loaded: {error} It is damaged; remove it to go on from an older "
            "checkpoint of the run, or to start anew."
        ) from error


def _cause(error: Exception) -> str:
    """Return the first rank's error line from torch's page of tracebacks."""
    lines = [
        line for line in str(error).splitlines() if re.match(r"[\w.]+(Error|Exception): ", line)
    ]
    return lines[0] if lines else str(error).splitlines()[0]
