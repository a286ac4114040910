"""The front end for NeMo 2; only this package imports NeMo and Lightning."""

import lightning.pytorch.loggers

import nemo_upcycle.engine  # noqa: F401  mends what NeMo imports
from nemo_upcycle.nemo.versions import check_lightning

check_lightning(lightning.pytorch.loggers)
