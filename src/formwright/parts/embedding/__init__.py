"""From ids, pixels or series to tokens."""
