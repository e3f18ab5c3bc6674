"""What the commands print: tables and summaries for people, JSON and YAML for scripts."""

from legocompress.report.numbers import format_count, format_ratio, format_size

from .benchmark import print_benchmark
from .calibration import print_calibration, print_layer_repairs
from .comparison import print_comparison
from .documents import print_json, print_plan_json, print_recipe
from .evaluation import print_evaluation
from .outcome import Outcome, describe_outcome, print_outcome
from .plan import print_plan, print_skipped
from .report import print_report, print_totals
from .sensitivity import print_rules, print_sensitivity, print_sum
from .tables import print_table

__all__ = [
    "Outcome",
    "describe_outcome",
    "format_count",
    "format_ratio",
    "format_size",
    "print_benchmark",
    "print_calibration",
    "print_comparison",
    "print_evaluation",
    "print_json",
    "print_layer_repairs",
    "print_outcome",
    "print_plan",
    "print_plan_json",
    "print_recipe",
    "print_report",
    "print_rules",
    "print_sensitivity",
    "print_skipped",
    "print_sum",
    "print_table",
    "print_totals",
]
