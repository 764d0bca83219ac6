"""How mixer and feed-forward are wired."""
