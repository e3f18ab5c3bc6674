"""The folder of a run: args.yaml, summary.csv, best/, last/ and the state to resume from."""

from __future__ import annotations

import csv
import io
import math
import pickle  # whose error torch.load raises
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.utils import update_summary
from torch import nn

from legocompress.checkpoint import save
from legocompress.errors import CheckpointError, OutputExistsError
from legocompress.files import write_atomically

ARGS, SUMMARY, STATE, BEST, LAST = "args.yaml", "summary.csv", "state.pt", "best", "last"
MAX_SUMMARY_ROWS = 10_000  # of epochs that are read back


class RunFolder:
    """Files of one run. A resumed run depends on `state.pt` only and rewrites the other files."""

    def __init__(self, path: Path):
        self.path = path

    def start_run(self, args: dict[str, Any], force: bool) -> None:
        """Start a run: write args.yaml in place of an earlier run if `force` is given.

        An earlier run is removed only after the new args.yaml is on the disk, so it survives a full
        disk.

        Raises:
            OutputExistsError: the folder is not empty, and either `force` is not given or it does
                not hold a run.
            OutputError: the folder cannot be written.
        """
        holds_run = (self.path / ARGS).is_file()
        if self.path.exists() and any(self.path.iterdir() if self.path.is_dir() else [0]):
            if not force:
                hint = ", continue it with --resume" if holds_run else ""
                raise OutputExistsError(
                    f"{str(self.path)!r} exists already; choose another --out{hint}, or replace it "
                    "with --force"
                )
            if not holds_run:
                raise OutputExistsError(
                    f"{str(self.path)!r} holds something other than a run, which --force does not "
                    "replace; choose another --out"
                )
        with write_atomically(self.path / ARGS, force) as file:
            file.write_text(yaml.safe_dump(args, sort_keys=False))
            for name in (STATE, SUMMARY):
                (self.path / name).unlink(missing_ok=True)
            for name in (BEST, LAST):
                shutil.rmtree(self.path / name, ignore_errors=True)

    def remove_unfinished_files(self) -> None:
        """Remove the temporary files that a killed run was writing when it died."""
        for name in (ARGS, SUMMARY, STATE, BEST, LAST):
            for unfinished in self.path.glob(f".{name}.*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the saved state; on a full disk, the earlier state stays.

        Raises:
            OutputError: the state cannot be written.
        """
        buffer = io.BytesIO()  # torch's own file writer hides the errno of a full disk
        torch.save(state, buffer)
        with write_atomically(self.path / STATE, force=True) as file:
            file.write_bytes(buffer.getbuffer())

    def load_state(self) -> dict[str, Any] | None:
        """Load the last saved state, on the CPU; None if no state was saved.

        Raises:
            CheckpointError: the file is damaged, or holds more than tensors and plain values.
        """
        if not (self.path / STATE).is_file():
            return None
        # torch.load reads plain values only, and raises pickle's own error for anything else.
        try:
            state = torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{str(self.path / STATE)!r} is damaged ({type(error).__name__}); start afresh "
                "with --force"
            ) from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{str(self.path / STATE)!r} is not the state of a run")
        return state

    def save_model(self, model: nn.Module, name: str) -> Path:
        """Write the network as the compressed folder `name`, replacing an earlier one."""
        return save(model, self.path / name, force=True)

    def read_summary(self) -> list[dict[str, float]]:
        """Read summary.csv: one row per epoch, without what is not a finite number.

        Returns:
            An empty list if there is no such file, or none that can be read.
        """
        try:
            with (self.path / SUMMARY).open(encoding="utf-8", newline="") as file:
                rows = list(islice(csv.DictReader(file), MAX_SUMMARY_ROWS))
        except (OSError, UnicodeDecodeError, csv.Error):
            return []
        return [{key: float(text) for key, text in row.items() if _is_finite(text)} for row in rows]

    def write_summary(self, rows: list[dict[str, Any]]) -> None:
        """Write all rows to summary.csv, in timm's format."""
        with write_atomically(self.path / SUMMARY, force=True) as file:
            for number, row in enumerate(rows):
                update_summary(
                    row["epoch"], row["train"], row["eval"], file, row["lr"], number == 0
                )


def find_run_folder(checkpoint: Path) -> Path | None:
    """Find the run that wrote a compressed folder as its best or last epoch; None if there is none.

    Args:
        checkpoint: the compressed folder.
    """
    folder = checkpoint.absolute().parent
    is_run = checkpoint.name in (BEST, LAST) and (folder / SUMMARY).is_file()
    return folder if is_run else None


def _is_finite(text: object) -> bool:
    """Whether a cell is a finite number; csv has lists and None for odd rows."""
    try:
        return isinstance(text, str) and math.isfinite(float(text))
    except ValueError:
        return False
