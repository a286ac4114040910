"""Plan which parts of a trained model fill a rank's shards, under any mapping."""

from collections.abc import Iterable

from nemo_upcycle.errors import UpcyclingError, listing
from nemo_upcycle.plans.rank import Plan, PlanBuilder, Shard, is_padded
from nemo_upcycle.trained.opened import Trained


def plan_restore(shards: Iterable[Shard], trained: Trained) -> Plan:
    """Plan which blocks of which tensors fill each shard of a rank.

    Args:
        shards: The shards that the rank owns.
        trained: The trained model.

    Raises:
        UpcyclingError: A shard has no source, or does not fit the source.
    """
    tensors = trained.checkpoint.tensors
    builder = PlanBuilder(tensors)
    for index, shard in enumerate(shards):
        parts = trained.segments(shard.name)
        total = sum(stop - start for _, start, stop in parts)
        _check_fits(shard, total, tensors[parts[0][0]].shape[1:])
        builder.copy(index, shard, parts, shard.columns)
    return builder.plan()


def _check_fits(shard: Shard, rows: int, columns: tuple[int, ...]) -> None:
    fits = shard.global_shape[0] == rows or is_padded(shard, rows)
    if shard.global_shape[1:] != columns or not fits:
        raise UpcyclingError(
            f"The model's {shard.name} is {list(shard.global_shape)}, the checkpoint's "
            f"{[rows, *columns]}. The config belongs to another model."
        )


def check_all_restored(trained: Trained, used: Iterable[str]) -> None:
    """Check that the ranks together have used the whole checkpoint.

    Args:
        trained: The trained model.
        used: Names of the tensors that any rank has read.

    Raises:
        UpcyclingError: A tensor was not used.
    """
    known = trained.unread | frozenset(used)
    left = [
        name
        for name in trained.checkpoint.tensors
        if name not in known and not name.endswith(("rotary_emb.inv_freq", "_extra_state"))
    ]
    if trained.model.arch.share_embeddings_and_output_weights:
        left = [name for name in left if name not in ("lm_head.weight", "output_layer.weight")]
    if left:
        raise UpcyclingError(
            f"The model has no place for {len(left)} tensors of {trained.checkpoint.directory}: "
            f"{listing(left)}. The config belongs to another model."
        )
