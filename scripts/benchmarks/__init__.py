"""Benchmarks, a module each; `scripts/benchmark.py` runs them."""
