"""Check initialisers against the dense checkpoint, before anything is written."""

from nemo_upcycle.checkpoint import DenseCheckpoint
from nemo_upcycle.checkpoint.fingerprint import weights_fingerprint
from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.initializers import Target, make_initializer, make_router_initializer


def check_initializers(upcycling: UpcyclingConfig, checkpoint: DenseCheckpoint) -> None:
    """Check that there are such initialisers, and that their statistics are of the checkpoint.

    Args:
        upcycling: Gives the initialisers; a dense model needs none.
        checkpoint: The dense checkpoint.

    Raises:
        UpcyclingError: There is no such initialiser, or its statistics are of another model.
    """
    if upcycling.num_moe_experts is None:
        return
    made = (
        make_initializer(upcycling.initializer),
        make_router_initializer(upcycling.router_initializer),
    )
    checks = [each.check for each in made if hasattr(each, "check")]
    if checks:
        target = Target(weights_fingerprint(checkpoint), checkpoint.architecture, upcycling)
        for check in checks:
            check(target)
