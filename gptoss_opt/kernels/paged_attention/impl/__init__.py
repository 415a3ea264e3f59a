"""Implementations of attention on pages. None imports another."""
