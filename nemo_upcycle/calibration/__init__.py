"""Statistics of a dense model over text, which initializers of experts and routers read."""
