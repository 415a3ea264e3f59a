"""The implementations of the experts' products and activation. None imports another."""
