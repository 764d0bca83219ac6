"""Formwright: a workshop for Transformers."""

__version__ = "0.1.0"
