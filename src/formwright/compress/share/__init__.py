"""Let layers of a trained model use the same weights."""
