"""The front for NeMo 2: all that knows NeMo and Lightning."""
