"""NeMo-Run recipes. `numbers` is plain data; only the factories import NeMo."""

import nemo_upcycle.engine  # noqa: F401  mends what a factory imports with NeMo
