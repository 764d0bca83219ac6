"""Published architectures for text."""
