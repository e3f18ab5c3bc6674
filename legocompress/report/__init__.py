"""Measure a network: sizes and costs, latency, and speed against the dense network."""

from legocompress.report.benchmark_run import BenchmarkRun
from legocompress.report.measurement import measure
from legocompress.report.results import Report
from legocompress.report.versus_dense import benchmark

__all__ = ["BenchmarkRun", "Report", "benchmark", "measure"]
