"""Modules that fill one slot of a block."""
