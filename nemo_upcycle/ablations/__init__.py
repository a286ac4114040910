"""The papers' comparisons at a size that a laptop can train: `nemo-upcycle ablate`."""
