"""A model that is configured by its checkpoint, for `nemo llm import model=upcycled_gpt …`."""

import lightning.pytorch as pl
import nemo_run as run

from nemo_upcycle.nemo.model import UpcycledGPTModel

NAME = "upcycled_gpt"


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Return a model, upcycled or dense, that takes its config from the checkpoint.

    Examples:
        CLI usage:
            $ nemo llm import model=upcycled_gpt source=hf:///models/e8t2_hf \
                output_path=/models/e8t2_nemo --yes
    """
    return run.Config(UpcycledGPTModel)
