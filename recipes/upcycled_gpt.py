"""What `nemo llm import` reads, and how a run begins with what was imported."""

import lightning.pytorch as pl
import nemo_run as run
from nemo.lightning import RestoreConfig

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


@run.cli.factory(name="weights")
def weights(path: str) -> run.Config[RestoreConfig]:
    """Return what a new run begins with: a checkpoint's weights, in place of random ones.

    Args:
        path: A NeMo 2 checkpoint of the recipe's model, imported or trained. The tokenizer stays
            the recipe's.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory "mistral_7b_e8t2(from_scratch=True)" \
                "resume.restore_config=weights(path=/models/e8t2_nemo)"
    """
    return run.Config(RestoreConfig, path=path, load_artifacts=False)
