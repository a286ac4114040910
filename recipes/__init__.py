"""NeMo-Run recipes. `numbers` is plain data; only the factories import NeMo."""
