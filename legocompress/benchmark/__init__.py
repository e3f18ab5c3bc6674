"""A compressed network against the dense one in its strongest forms."""

from legocompress.benchmark.compare import BenchmarkRun, benchmark

__all__ = ["BenchmarkRun", "benchmark"]
