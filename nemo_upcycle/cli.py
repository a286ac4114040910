"""The commands of `nemo-upcycle`, which are those of `nemo upcycle` without NeMo's imports.

Everything heavy is imported inside the functions: `--help` and the light commands answer at once.
"""

import typer

app = typer.Typer(
    name="nemo-upcycle",
    help="Upcycle dense LLM checkpoints into Mixture-of-Experts models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def version() -> None:
    """Print the version."""
    from nemo_upcycle import __version__

    typer.echo(__version__)


def main() -> None:
    """Run `nemo-upcycle`."""
    app()
