"""Attention functions: q, k, v -> mixed values."""
