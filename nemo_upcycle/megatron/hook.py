"""The hook that fills a model from a dense checkpoint, before the model is wrapped and trained."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_upcycle.checkpoint.beside import MODEL_FIELDS
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine.model import mark_experts
from nemo_upcycle.engine.provenance import Origin, mapping_of
from nemo_upcycle.engine.ranks import TIMEOUT_S, Ranks, check_same, said_on_every_rank
from nemo_upcycle.engine.run_settings import ROUTER_WARM_UP, changes
from nemo_upcycle.engine.upcycling import Prepared, fill_all, prepare
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families.fields import (
    DENSE_GRADIENT,
    LOGIT_NORMALIZATION,
    moe_fields,
    upcycling_in,
)
from nemo_upcycle.megatron.model import Chunks, described, fields_beside_config, with_rope_of
from nemo_upcycle.megatron.router_warm_up import RouterWarmUp
from nemo_upcycle.megatron.run import checkpoint_to_resume, read_origin, write_origin

PREFIX = "[upcycle]"

_WAY_OUT = (
    "Make the config with nemo_upcycle.megatron.gpt_model_config, or set these fields of the "
    "GPTModelConfig, or of its TransformerConfig, to what is expected."
)


def upcycle(
    dense_checkpoint: str,
    upcycling: UpcyclingConfig | None = None,
    *,
    resume_from: str | Path | None = None,
    vocab_size_divisible_by: int = 128,
    read_once: bool = False,
    router_warm_up: RouterWarmUp | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Callable[[Chunks], Chunks]:
    """Return a hook for `pre_wrap_hooks` that upcycles a dense checkpoint on a fresh start.

    Megatron calls the hook at every start, with the models of all virtual pipeline stages, before
    Float16Module and DistributedDataParallel, and before a checkpoint is loaded. Every rank reads
    only the slices that fill its own shards; no rank holds the dense model. If there is a
    checkpoint to resume, the hook fills nothing, and checks that the run continues as begun.

    Args:
        dense_checkpoint: Directory in the format of Hugging Face, NeMo 2, Megatron-LM or
            Megatron-Bridge, or the name of a model in the local Hugging Face cache. Several,
            separated by semicolons, give experts in turn, and all other weights are averaged
            (Branch-Train-MiX).
        upcycling: What the feed-forward layers become; None copies the layers into the experts
            that the model's config has.
        resume_from: The directory that the run saves to and loads from (`--load`, Bridge's
            `checkpoint.load`). The directory also keeps the record of the run's origin. None
            upcycles at every start.
        vocab_size_divisible_by: Largest multiple to which the model's vocabulary is padded per
            tensor-parallel rank.
        read_once: Read each slice once per job and broadcast the slice to all ranks that hold it,
            for file systems that are slower than the network between nodes.
        router_warm_up: The run's warm-up of routers, whose steps are recorded, and may not change
            on a resume; None for none.
        timeout_s: Seconds that a rank waits for the others before they count as lost.

    Returns:
        The hook. On every rank the hook raises `UpcyclingError` if the checkpoint cannot be used,
        the model is another, a resume contradicts the beginning, or a rank has failed.

    Raises:
        UpcyclingError: `resume_from` is not a directory of a file system.

    Source: online upcycling, arXiv 2412.09952 §3.
    """
    if "://" in str(resume_from):
        raise UpcyclingError(
            f"resume_from is {resume_from}; expected a directory of a file system, where the hook "
            "can see a checkpoint to resume."
        )
    run = None if resume_from is None else Path(resume_from)
    settings = {ROUTER_WARM_UP: router_warm_up.steps if router_warm_up else 0}
    return _Hook(
        dense_checkpoint, upcycling, run, vocab_size_divisible_by, read_once, settings, timeout_s
    )


@dataclass(frozen=True)
class _Start:
    """What a rank knows before any weight is read.

    Attributes:
        origin: The run's origin according to the command.
        config: The model's fields, see `described`.
        prepared: The dense checkpoint; None if a resume does without the dense checkpoint.
        resumed: The checkpoint that is resumed; None on a fresh start.
        remarks: What the user should know.
    """

    origin: Origin
    config: SimpleNamespace
    prepared: Prepared | None
    resumed: Path | None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Hook:
    dense_checkpoint: str
    upcycling: UpcyclingConfig | None
    run: Path | None
    vocab_size_divisible_by: int
    read_once: bool
    settings: Mapping[str, Any]
    timeout_s: float

    def __call__(self, chunks: Chunks) -> Chunks:
        for chunk in chunks:
            mark_experts(chunk)
        with said_on_every_rank(PREFIX):
            ranks = Ranks(self.timeout_s)
            start = ranks.on_all(lambda: self._begin(chunks))
            views = ranks.gather((str(start.resumed), start.origin.fingerprint))
            check_same("checkpoints to resume from", [resumed for resumed, _ in views])
            check_same("dense checkpoints", [found for _, found in views])
            lines = [*start.remarks]
            if start.resumed is None:
                lines += self._fill(chunks, start, ranks)
            else:
                lines.append(f"resuming from {start.resumed}: not upcycling again")
        if ranks.rank == 0:
            print("\n".join(f"{PREFIX} {line}" for line in lines), flush=True)
        return chunks

    def _begin(self, chunks: Chunks) -> _Start:
        """Check what can be checked before weights are read."""
        config = described(chunks, self.vocab_size_divisible_by)
        upcycling = self.upcycling or upcycling_in(config, router_init_std=config.init_method_std)
        resumed = None if self.run is None else checkpoint_to_resume(self.run)
        try:
            prepared = prepare(self.dense_checkpoint, upcycling)
        except UpcyclingError as error:
            if resumed is None:
                raise
            origin = self._origin(None, upcycling)
            remark = f"the resume does not need the dense checkpoint: {error}"
            return _Start(origin, config, None, resumed, (remark, *_check_origin(origin, resumed)))
        normalization = upcycling.router_logit_normalization
        unsaid = fields_beside_config(prepared.checkpoint.architecture, normalization)
        kept = {**(prepared.kept or {}), MODEL_FIELDS: unsaid}
        origin = self._origin(prepared.fingerprint, upcycling, kept)
        if resumed is not None:
            return _Start(origin, config, prepared, resumed, tuple(_check_origin(origin, resumed)))
        _check_has_memory(chunks)
        with_rope = with_rope_of(config, chunks, prepared.checkpoint.architecture)
        prepared.check_model(with_rope, way_out=_WAY_OUT)
        _check_experts(config, prepared)
        return _Start(origin, config, prepared, resumed)

    def _origin(
        self,
        fingerprint: str | None,
        upcycling: UpcyclingConfig,
        kept: Mapping[str, Any] | None = None,
    ) -> Origin:
        origin = Origin.of(self.dense_checkpoint, fingerprint, upcycling, kept)
        return replace(origin, settings=self.settings)

    def _fill(self, chunks: Chunks, start: _Start, ranks: Ranks) -> list[str]:
        """Fill the model on all ranks, and record the run's origin; return the report."""
        assert start.prepared is not None
        report = fill_all(start.prepared, chunks, start.config, ranks, self.read_once)

        def record() -> None:
            if ranks.rank == 0 and self.run is not None:
                mapping = mapping_of(start.config, ranks.size, _ranks_per_node(ranks))
                write_origin(
                    replace(start.origin, step0=str(report.exactness), mapping=mapping), self.run
                )

        ranks.on_all(record)
        return str(report).splitlines()


def _ranks_per_node(ranks: Ranks) -> int:
    """Return torchrun's number of ranks per node; all ranks without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))


def _check_origin(now: Origin, resumed: Path) -> list[str]:
    """Check that a resume continues as the run began; return remarks."""
    saved = read_origin(resumed)
    if saved is None:
        return [
            f"{resumed} does not say what the run was begun with: another program has saved the "
            "checkpoint, which is taken as it is"
        ]
    saved.check(now, str(resumed))
    return changes(saved.settings, now.settings, str(resumed), fixed=now.settings)


def _check_experts(config: SimpleNamespace, prepared: Prepared) -> None:
    """Check that the model has the experts that `UpcyclingConfig` asks for.

    Raises:
        UpcyclingError: The model has other experts; the message lists all fields that differ.
    """
    asked = moe_fields(prepared.checkpoint.architecture, prepared.upcycling)
    if asked["num_moe_experts"] is not None and config.num_moe_experts is not None:
        for name, default in ((LOGIT_NORMALIZATION, None), (DENSE_GRADIENT, False)):
            asked.setdefault(name, default)  # no fields of Megatron's
            if not hasattr(config, name):
                setattr(config, name, default)
        # A width of None is the dense layer's.
        config = SimpleNamespace(**vars(config))
        config.moe_ffn_hidden_size = config.moe_ffn_hidden_size or config.ffn_hidden_size
        config.moe_layer_freq = _every_layer(config.moe_layer_freq)
        asked["moe_layer_freq"] = _every_layer(asked["moe_layer_freq"])
    wrong = [
        f"{name} is {getattr(config, name)!r}, asked for {value!r}"
        for name, value in asked.items()
        if getattr(config, name) != value
    ]
    if wrong:
        raise UpcyclingError(
            f"The model has other experts than UpcyclingConfig says: {'; '.join(wrong)}. Make the "
            "config with nemo_upcycle.megatron.gpt_model_config and the same UpcyclingConfig; or "
            "give the hook no UpcyclingConfig, and the experts are the model's."
        )


def _every_layer(frequency: int | list[int]) -> int | list[int]:
    return 1 if frequency != 1 and isinstance(frequency, list) and all(frequency) else frequency


def _check_has_memory(chunks: Chunks) -> None:
    """Check that weights can be written: without memory they would be lost, with no error."""
    if any(parameter.is_meta for chunk in chunks for parameter in chunk.parameters()):
        raise UpcyclingError(
            "The model's parameters have no memory yet (init_model_with_meta_device=True): weights "
            "written now would be lost. Set init_model_with_meta_device=False."
        )
