"""What a run was upcycled from, what became of it, and whether step 0 was exact."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.engine.provenance import DENSE
from nemo_upcycle.engine.run_settings import ROUTER_WARM_UP
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.evaluation.curves import TRAIN_LOSS
from nemo_upcycle.progress import scaled
from nemo_upcycle.report.figures import final_loss
from nemo_upcycle.report.runs import BATCH_SIZE, SEQ_LENGTH, Run

_SAME_DATA = (SEQ_LENGTH, "data.paths", "data.seed", "data.split", "data.tokenizer")
"""Settings that decide which tokens come in which order."""


@dataclass(frozen=True)
class StepZero:
    """Whether the MoE computes the dense model's function at step 0.

    Attributes:
        verdict: `exact`, `not exact` or `not recorded`.
        text: The reason, and where it is known from.
        measured: The first losses of both runs; empty without a dense run.
    """

    verdict: str
    text: str
    measured: str = ""


def headline(run: Run) -> str:
    """Return what the run is, in one line."""
    source = run.record.get("dense_checkpoint")
    if run.record.get("weights", DENSE) != DENSE:
        return f"trained from {run.record['weights']}" + (f": {source}" if source else "")
    if not source:
        return "a run that has recorded no origin yet"
    upcycling = config_of(run)
    if run.experts is None:
        return f"the dense model, trained on from {source}"
    return f"{upcycling.label if upcycling else f'{run.experts} experts'}, upcycled from {source}"


def config_of(run: Run) -> UpcyclingConfig | None:
    """Return the upcycling as checked options; None if not recorded, or by another version."""
    known = {field.name for field in fields(UpcyclingConfig)}
    # JSON has no tuples.
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in run.upcycling.items()
        if name in known
    }
    try:
        return UpcyclingConfig(**options) if options else None
    except (UpcyclingError, TypeError):
        return None


def step_zero(run: Run, dense: Run | None) -> StepZero:
    """Return what is known of step 0.

    Args:
        run: The run.
        dense: The run that trains the dense model on; None if not given.
    """
    measured = _measured(run, dense)
    if run.record.get("weights", DENSE) != DENSE:
        text = "The run did not begin from a dense checkpoint."
        return StepZero("not recorded", text, measured)
    said = run.record.get("step0")
    if isinstance(said, str):
        verdict, _, reason = said.partition(": ")
        return StepZero(
            verdict, f"{_sentence(reason)} The run reported this when it began.", measured
        )
    config, gated = config_of(run), run.settings.get("model.config.gated_linear_unit")
    if config is None or gated is None:
        text = (
            "The run has not recorded its report. nemo-upcycle verify DENSE MOE compares both "
            "models."
        )
        return StepZero("not recorded", text, measured)
    sources = len(str(run.record.get("dense_checkpoint")).split(";"))
    exactness = config.exactness(bool(gated), sources)
    text = f"{_sentence(exactness.reason)} This follows from the options; the run's own report is "
    text += "not recorded, as in all runs of earlier versions."
    return StepZero("exact" if exactness.exact else "not exact", text, measured)


def origin_rows(run: Run) -> list[tuple[str, str]]:
    """Return the run's origin as names and values."""
    record, rows = run.record, []
    rows.append(("weights from", str(record.get("weights", DENSE))))
    rows.append(("dense checkpoint", _text(record.get("dense_checkpoint"))))
    rows.append(("fingerprint of the weights", _text(record.get("fingerprint"))))
    kept = record.get("kept")
    if isinstance(kept, Mapping):
        rows.append(("architecture", _text(kept.get("model_type"))))
        rows.append(("context of the dense model", _text(kept.get("max_position_embeddings"))))
    config = config_of(run)
    if config is not None and run.experts is not None:
        rows += _upcycling_rows(config, run)
    rows.append(("record from", run.checkpoint or "a file in the run's directory"))
    return [(name, value) for name, value in rows if value]


def _upcycling_rows(config: UpcyclingConfig, run: Run) -> list[tuple[str, str]]:
    layers = run.settings.get("model.config.num_layers")
    order = "softmax, then top-k" if config.moe_router_pre_softmax else "top-k, then softmax"
    if config.moe_router_score_function == "sigmoid":
        order = "sigmoid, then top-k"
        if config.moe_router_enable_expert_bias:
            order += f", balanced by a bias in steps of {config.moe_router_bias_update_rate:g}"
    shards = f" × {config.granularity} shards" if config.granularity > 1 else ""
    capacity = config.moe_expert_capacity_factor
    return [
        ("became", config.label),
        ("experts", f"{config.num_moe_experts} ({config.expansion_rate} copies{shards})"),
        ("layers", _text(layers)),
        ("MoE layers", "all" if config.moe_layer_freq == 1 else str(config.moe_layer_freq)),
        ("experts per token", f"{config.moe_router_topk} ({order})"),
        ("initializer of experts", config.initializer),
        ("initializer of routers", f"{config.router_initializer}, σ = {config.router_init_std:g}"),
        ("weight scaling", config.scaling),
        ("seed", str(config.seed)),
        (
            "load balancing",
            f"{config.moe_router_load_balancing_type}, {config.moe_aux_loss_coeff:g}",
        ),
        ("router z-loss", _text(config.moe_z_loss_coeff) or "none"),
        ("capacity factor", "none: no token is dropped" if capacity is None else f"{capacity:g}"),
    ]


def training_rows(run: Run) -> list[tuple[str, str]]:
    """Return how the run is trained as names and values."""
    settings = run.settings
    warm_up = settings.get(ROUTER_WARM_UP)
    batch = list(run.scalars.get(BATCH_SIZE, {}).values())
    rows = [
        ("tokens so far", _tokens(run)),
        ("steps", f"{_steps(run)} of {_text(settings.get('trainer.max_steps')) or '?'}"),
        ("sequence length", _text(settings.get(SEQ_LENGTH))),
        ("sequences per step", f"{batch[-1]:g}" if batch else ""),
        ("optimizer", _text(settings.get("optim.config.optimizer"))),
        ("largest learning rate", _text(settings.get("optim.config.lr"))),
        ("schedule", _text(settings.get("optim.lr_scheduler"))),
        ("weight decay", _text(settings.get("optim.config.weight_decay"))),
        ("router warm-up", f"{warm_up} steps" if warm_up else ""),
        ("precision", _text(settings.get("trainer.plugins.precision"))),
        ("tokenizer", _text(settings.get("data.tokenizer"))),
    ]
    paths = settings.get("data.paths")
    for entry in paths if isinstance(paths, list) else []:
        if isinstance(entry, list) and len(entry) == 3:
            weight, prefix, content = entry
            share = "" if weight is None else f"{weight:g} × "
            rows.append(("data", f"{share}{prefix} (fingerprint {content})"))
    return [(name, value) for name, value in rows if value]


def summary(run: Run, dense: Run | None) -> list[tuple[str, str]]:
    """Return the numbers at the top of the page."""
    rows = []
    if tokens := _tokens(run):
        rows.append(("training tokens", tokens))
    for name, each in (("loss", run), ("dense loss", dense)):
        if each and each.scalars.get(TRAIN_LOSS):
            rows.append((f"{name}, last 10%", f"{final_loss(each):.4f}"))
    if run.experts:
        rows.append(("experts per layer", str(run.experts)))
    return rows


def _measured(run: Run, dense: Run | None) -> str:
    """Compare the first losses, if both are of the same step."""
    if dense is None:
        return ""
    first = [sorted(each.scalars.get(TRAIN_LOSS, {}).items())[:1] for each in (run, dense)]
    if not all(first) or first[0][0][0] != first[1][0][0]:
        return "The runs have no training loss of the same first step."
    (step, moe), (_, other) = (each[0] for each in first)
    text = f"First training loss, at step {step}: {moe:.6f} here, {other:.6f} in {dense.name}"
    text += f" (difference {abs(moe - other):.1e})." if moe != other else " (no difference)."
    if differing := _other_data(run, dense):
        text += f" The runs' {differing} differs, so the losses are of other tokens."
    return text


def _other_data(run: Run, dense: Run) -> str:
    """Return the first setting of the data that differs; of data sets, only the contents count."""
    for name in _SAME_DATA:
        if name in run.settings and name in dense.settings:
            one, other = (_contents(each.settings[name]) for each in (run, dense))
            if one != other:
                return name
    return ""


def _contents(value: Any) -> Any:
    if isinstance(value, list):
        return [
            (each[0], each[2]) if isinstance(each, list) and len(each) == 3 and each[2] else each
            for each in value
        ]
    return value


def _steps(run: Run) -> int:
    return max(run.scalars.get(TRAIN_LOSS, {}), default=-1) + 1


def _tokens(run: Run) -> str:
    if not run.tokens_after or not _steps(run):
        return ""
    return scaled(run.tokens_after(_steps(run)), 1000, ("", " k", " M", " B", " T"))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _text(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
