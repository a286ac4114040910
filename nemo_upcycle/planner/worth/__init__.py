"""Whether upcycling pays: its cost, and its loss by a published scaling law."""
