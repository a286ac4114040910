"""NeMo-Run recipes. `numbers` is plain data; only the factories import NeMo."""

from nemo_upcycle.engine.versions import mend

mend()  # before a factory imports NeMo
