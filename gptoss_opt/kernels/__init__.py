"""Pure functions on tensors. Knows torch, and nothing of models."""
