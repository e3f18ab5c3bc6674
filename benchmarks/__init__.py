"""Benchmarks: one script per claim of the documentation. README.md lists them."""
