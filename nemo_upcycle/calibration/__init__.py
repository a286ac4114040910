"""Statistics of a dense model over text, which initialisers of experts and routers read."""
