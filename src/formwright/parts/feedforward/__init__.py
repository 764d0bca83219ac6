"""Position-wise layers."""
