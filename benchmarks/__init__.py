"""Benchmarks: one file per case. Each verifies what it times, beside its peers, in one run."""
