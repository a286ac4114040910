"""The papers' comparisons at a size that a laptop trains: `nemo-upcycle ablate`."""
