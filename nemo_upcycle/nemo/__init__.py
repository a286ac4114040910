"""The front end for NeMo 2; only this package imports NeMo and Lightning."""
