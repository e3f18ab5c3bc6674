"""Where the export benchmarks keep their files, and their options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from benchmarks.common.arguments import make_parser

OnnxForm = Literal["lego", "assemble-at-load", "dense"]
ONNX_FORMS: tuple[OnnxForm, ...] = ("lego", "assemble-at-load", "dense")
DTYPES = ("fp32", "fp16", "int8")


def get_place(out: Path, name: str, dtype: str) -> Path:
    """The folder of one network's files with filters of a dtype."""
    return out / f"{name.replace('/', '-')}-{dtype}"


def make_export_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of both scripts."""
    parser = make_parser(doc)
    parser.add_argument("--out", type=Path, default=Path("exports"), help="folder of the files")
    parser.add_argument("--results", type=Path, default=Path("export.jsonl"), help="file of rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=["fp32"])
    parser.add_argument("--only", nargs="*", help="networks, by name")
    parser.add_argument("--table", action="store_true", help="only print the tables of --results")
    return parser
