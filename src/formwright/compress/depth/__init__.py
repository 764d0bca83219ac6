"""Fewer layers for inputs that need fewer."""
