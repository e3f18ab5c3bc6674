"""Running the command line in a test, and checking how it ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

DEMO = Path(str(files("legocompress") / "demo"))
DENSE = f"local-dir:{DEMO / 'fashion-resnet'}"
PHOTOS = str(DEMO / "fashion-calibration.npz")
SAMPLE = str(DEMO / "fashion-sample.npz")
# A narrow ResNet-18 of random weights.
SIZES = ["--model-kwargs", "channels=[8,8,16,16]", "--model-kwargs", "layers=[1,1,1,1]"]
SMALL = ["resnet18", "--no-pretrained", "--num-classes", "4", "--img-size", "32", *SIZES]
ALL = "--allow-expansion"


class Ran(NamedTuple):
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


def check_error(ran: Ran, code: int, *words: str) -> None:
    """Check that a command printed one line with these words to standard error, nothing else."""
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert re.fullmatch(r"Error: [^\n]+\n", ran.err), ran.err
    assert "Traceback" not in ran.err
    for word in words:
        assert word in ran.err


def list_files(folder: Path) -> set[str]:
    """The paths of everything in a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
