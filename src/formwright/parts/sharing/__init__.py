"""Which layers of a stack use the same matrices."""
