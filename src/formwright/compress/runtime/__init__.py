"""The same outputs, faster: how a model is executed."""
