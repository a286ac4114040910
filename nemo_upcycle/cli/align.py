"""`nemo-upcycle align`: a dense checkpoint with its neurons in the order of another's."""

from pathlib import Path
from typing import Annotated

import typer

from nemo_upcycle.cli.tools import one_line_errors
from nemo_upcycle.progress import progress


@one_line_errors
def align(
    reference: Annotated[Path, typer.Argument(help="A dense Hugging Face directory.")],
    other: Annotated[Path, typer.Argument(help="The one to align, of the same architecture.")],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
) -> None:
    """Permute the feed-forward neurons of a dense checkpoint to match another's.

    The copy computes the same function. The order matters where the feed-forward layers of several
    dense checkpoints are averaged, as in dense layers and shared experts of an MoE.

    \b
    Example:
      nemo-upcycle align base-code base-math math-aligned
      nemo-upcycle upcycle "base-code; math-aligned" OUT --shared-expert
    """
    from nemo_upcycle.trained.aligned import align

    with progress("align") as show:
        found = align(reference.expanduser(), other.expanduser(), out.expanduser(), show)
    typer.echo(
        f"{out}: {found.moved:.1%} of the neurons have another place; distance from {reference} "
        f"{found.before:.3f} before, {found.after:.3f} after"
    )
