"""The implementations of attention. None imports another: `backends` says which one serves what."""
