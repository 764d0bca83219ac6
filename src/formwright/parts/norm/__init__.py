"""Normalisations, and initialisation schemes."""
