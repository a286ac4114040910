"""The initializers of a config: checks before anything is written, and what they read."""

from nemo_upcycle.checkpoint import DenseCheckpoint
from nemo_upcycle.checkpoint.fingerprint import weights_fingerprint
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.initializers import (
    Initializer,
    RouterInitializer,
    Target,
    make_initializer,
    make_router_initializer,
)
from nemo_upcycle.initializers.statistics import digests


def check_initializers(upcycling: UpcyclingConfig, checkpoint: DenseCheckpoint) -> None:
    """Check that there are such initializers, and that their statistics are of the checkpoint.

    Args:
        upcycling: Gives the initializers; a dense model needs none.
        checkpoint: The dense checkpoint.

    Raises:
        UpcyclingError: There is no such initializer, or its statistics are of another model.
    """
    if upcycling.num_moe_experts is None:
        return
    checks = [each.check for each in _made(upcycling) if hasattr(each, "check")]
    if checks:
        target = Target(weights_fingerprint(checkpoint), checkpoint.architecture, upcycling)
        for check in checks:
            check(target)


def statistics_digests(upcycling: UpcyclingConfig) -> dict[str, str]:
    """Return the digests of the statistics that the initializers read, by path; see `digests`."""
    return {} if upcycling.num_moe_experts is None else digests(_made(upcycling))


def _made(upcycling: UpcyclingConfig) -> tuple[Initializer, RouterInitializer]:
    return (
        make_initializer(upcycling.initializer),
        make_router_initializer(upcycling.router_initializer),
    )
