"""Remove weights, neurons, heads, blocks and layers."""
