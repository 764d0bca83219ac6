"""Whole systems built from parts, each an ordinary Hugging Face model."""
