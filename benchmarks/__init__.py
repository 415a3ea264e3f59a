"""Benchmarks: `python -m benchmarks NAME` verifies what it measures, beside its peers in one run."""
