"""The front end for NeMo 2; only this package imports NeMo and Lightning."""

import lightning.pytorch.loggers

from nemo_upcycle.engine.versions import mend
from nemo_upcycle.nemo.versions import check_lightning

mend()  # before NeMo imports what is mended
check_lightning(lightning.pytorch.loggers)
