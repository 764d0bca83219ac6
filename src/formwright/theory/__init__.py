"""What can be said of a model without training it, and measured to see whether it is so."""
