"""A larger MoE from a trained one: experts are duplicated, and the router's rows repeated.

Expert e of the larger model is expert e mod E of the source. A token that gets all copies of its
experts gets the source's output: each copy has the weight of its expert divided by the copies.

Source: Expert Upcycling, arXiv 2604.19835 §3. The paper keeps the number of experts per token,
adds noise to the router's biases, and may copy some experts more often; here the noise is on the
router's rows, because most architectures have no biases, and all experts are copied alike.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite, prod
from pathlib import Path

from nemo_upcycle.checkpoint import DTYPE_BYTES, TensorInfo
from nemo_upcycle.checkpoint.huggingface import resolve_directory
from nemo_upcycle.config import Exactness
from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.families.model import MoEModel
from nemo_upcycle.families.moe_family import MoEFamily
from nemo_upcycle.trained.opened import Trained, open_as_stored
from nemo_upcycle.trained.outputs import Output, Part

NOISE = 0.01
"""Router noise where the function is not kept anyway: that of the paper's code."""

_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class Growth:
    """What a trained MoE becomes.

    Attributes:
        experts: Experts per MoE layer, a multiple of the source's; None doubles them.
        topk: Experts per token; None takes what keeps the function, as a rule the source's times
            the copies.
        router_noise: Standard deviation of the noise on the router's rows of all copies but the
            first, relative to the router's own; None for 0 if `topk` keeps the function, else 0.01.
        seed: Seed of the noise.
    """

    experts: int | None = None
    topk: int | None = None
    router_noise: float | None = None
    seed: int = 1234


@dataclass(frozen=True)
class GrownDirectory:
    """The plan of a larger MoE.

    Attributes:
        source: The trained MoE.
        model: The larger one.
        family: The architecture of transformers, of both.
        growth: What was asked for, without None.
        dtype: dtype of the embeddings, by safetensors' name.
        outputs: The tensors by name, whose parts are rows of the source's tensors.
        notes: Notes for the user.
    """

    source: Trained
    model: MoEModel
    family: MoEFamily
    growth: Growth
    dtype: str
    outputs: Mapping[str, Output]
    notes: list[str] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        """The source's directory."""
        return self.source.checkpoint.directory

    @property
    def copies(self) -> int:
        """Copies of each expert."""
        return self.model.num_experts // self.source.model.num_experts

    @cached_property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(output.bytes for output in self.outputs.values())

    @cached_property
    def parameters(self) -> int:
        """Elements of the model."""
        return sum(prod(output.info.shape) for output in self.outputs.values())

    @cached_property
    def active_parameters(self) -> int:
        """Elements used per token."""
        routed = sum(
            prod(output.info.shape)
            for name, output in self.outputs.items()
            if output.stack > 1 or _EXPERT.search(name)
        )
        unused = self.model.num_experts - self.model.topk
        return self.parameters - routed * unused // self.model.num_experts

    @property
    def exactness(self) -> Exactness:
        """Whether the larger model computes the source's function, and why."""
        kept, topk = exact_topk(self.source.model, self.copies), self.model.topk
        problems = []
        if topk != kept:
            problems.append(
                f"{topk} experts per token are not all {self.copies} copies of the source's "
                f"{self.source.model.topk} (topk={kept} keeps the function); copies of an expert "
                "have nearly equal scores, so that a token gets fewer different experts"
            )
        if self.growth.router_noise:
            problems.append(
                f"the router's rows of copies have noise of {self.growth.router_noise:g} of the "
                "router's standard deviation"
            )
        if problems:
            return Exactness(False, "; ".join(problems))
        if topk == self.source.model.topk:
            return Exactness(True, f"a token gets one of {self.copies} equal copies of its expert")
        return Exactness(True, f"a token gets all {self.copies} copies of each of its experts")


def exact_topk(source: MoEModel, copies: int) -> int:
    """Return the experts per token with which copies compute the source's function.

    With softmax, before or after top-k, and with sigmoid scores that are normalized, each copy's
    weight is the expert's divided by the copies. Megatron-Core, and so this package's GLM-4-MoE,
    does not normalize the sigmoid score of a single expert.

    Args:
        source: The trained MoE.
        copies: Copies of each expert.
    """
    if source.score_function == "sigmoid" and source.topk == 1:
        return 1
    return source.topk * copies


def plan_growth(
    source: str | Path, growth: Growth | None = None, dtype: str | None = None
) -> GrownDirectory:
    """Plan a larger MoE by headers and configs alone.

    Args:
        source: A Hugging Face directory of an MoE, or its name in the local hub cache.
        growth: What the MoE becomes.
        dtype: `F32`, `BF16` or `F16`; None keeps each tensor's.

    Raises:
        UpcyclingError: The source is no such MoE or not whole, or cannot become that.
    """
    trained = open_as_stored(resolve_directory(source))
    assert trained.family is not None
    growth = _resolved(growth or Growth(), trained.model)
    assert growth.experts is not None and growth.topk is not None
    model = replace(trained.model, num_experts=growth.experts, topk=growth.topk)
    _check_whole(trained, trained.family)
    outputs = _outputs(trained, trained.family, model, dtype)
    own = trained.dtype
    plan = GrownDirectory(trained, model, trained.family, growth, dtype or own, outputs)
    if DTYPE_BYTES[plan.dtype] < DTYPE_BYTES[own]:
        plan.notes.append(f"weights are rounded from {own} to {dtype}")
    if not growth.router_noise:
        plan.notes.append(
            "the copies of an expert are equal and get equal gradients: training does not make "
            f"them differ. Give a router noise, such as {NOISE:g}, for a model that is to be "
            "trained"
        )
    return plan


def _resolved(growth: Growth, source: MoEModel) -> Growth:
    """Return the growth with numbers in place of None, checked."""
    experts = 2 * source.num_experts if growth.experts is None else growth.experts
    if experts % source.num_experts or experts <= source.num_experts:
        raise UpcyclingError(
            f"experts is {experts}, and the Mixture-of-Experts has {source.num_experts}; expected "
            f"a multiple, such as {2 * source.num_experts}: every expert gets as many copies."
        )
    kept = exact_topk(source, experts // source.num_experts)
    topk = kept if growth.topk is None else growth.topk
    least = 1 if source.pre_softmax or source.score_function == "sigmoid" else 2
    if not least <= topk <= experts:
        why = "" if least == 1 else " (the softmax of one value is 1: a router would not learn)"
        raise UpcyclingError(f"topk is {topk}; expected {least} to {experts}{why}.")
    noise = growth.router_noise
    if noise is None:
        noise = 0.0 if topk == kept else NOISE
    if not (isfinite(noise) and noise >= 0):
        raise UpcyclingError(f"router_noise is {noise}; expected a number of 0 or more.")
    if not 0 <= growth.seed < 2**63:
        raise UpcyclingError(f"seed is {growth.seed}; expected an integer from 0 to 2**63 - 1.")
    return Growth(experts, topk, noise, growth.seed)


def _check_whole(trained: Trained, family: MoEFamily) -> None:
    """Check that the source has the tensors of its architecture and no others."""
    tensors, expected = trained.checkpoint.tensors, family.shapes(trained.model)
    missing = sorted(expected.keys() - tensors.keys())
    ignored = family.dense.ignored
    if trained.model.arch.share_embeddings_and_output_weights and family.dense.tied:
        ignored += family.dense.tied[:1]
    left = sorted(name for name in tensors if name not in expected and not name.endswith(ignored))
    for what, names in {"lacks": missing, f"has, unlike a {family.class_name},": left}.items():
        if names:
            raise UpcyclingError(
                f"{trained.checkpoint.directory} {what} {len(names)} tensors: {listing(names)}. "
                "The checkpoint is incomplete, or the config is another model's."
            )


def _outputs(
    trained: Trained, family: MoEFamily, model: MoEModel, dtype: str | None
) -> dict[str, Output]:
    """Return the tensors of the larger model, made of rows of the source's."""
    outputs = {}
    for name, shape in sorted(family.shapes(model).items()):
        origin = _EXPERT.sub(lambda e: str(int(e[0]) % trained.model.num_experts), name)
        info = trained.checkpoint.tensors[origin]
        rows = info.shape[0]
        is_bias = name.endswith("e_score_correction_bias")
        kept = info.dtype if dtype is None or is_bias else dtype
        # Routers and stacked experts have more rows than the source's, all others as many.
        parts = {start: Part(origin, 0, rows) for start in range(0, shape[0], rows or 1)}
        stack = family.stack(name, model)
        outputs[name] = Output(TensorInfo(shape, kept), parts, stack=stack)
    return outputs
