"""The folder of a run: args.yaml, summary.csv, best/, last/ and the state to resume from."""

from __future__ import annotations

import io
import pickle  # whose error torch.load raises
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.utils import update_summary
from torch import nn

from legocompress.checkpoint import save
from legocompress.errors import CheckpointError, OutputExistsError
from legocompress.files import writing

ARGS, SUMMARY, STATE, BEST, LAST = "args.yaml", "summary.csv", "state.pt", "best", "last"


class RunFolder:
    """Files of one run. `state.pt` alone decides what a resumed run does; the rest follows it."""

    def __init__(self, path: Path):
        self.path = path

    def begin(self, args: dict[str, Any], force: bool) -> None:
        """Start a run here.

        Raises:
            OutputExistsError: something stands here, and `force` is not given or it is no run.
        """
        ours = (self.path / ARGS).is_file()
        if self.path.exists() and any(self.path.iterdir() if self.path.is_dir() else [0]):
            if not force:
                hint = ", go on with it by --resume" if ours else ""
                raise OutputExistsError(
                    f"{str(self.path)!r} exists already; choose another --out{hint}, or replace it "
                    "with --force"
                )
            if not ours:
                raise OutputExistsError(
                    f"{str(self.path)!r} holds something else than a run, which even --force does "
                    "not replace; choose another --out"
                )
            for name in (STATE, SUMMARY, ARGS):
                (self.path / name).unlink(missing_ok=True)
            for name in (BEST, LAST):
                shutil.rmtree(self.path / name, ignore_errors=True)
        with writing(self.path / ARGS) as file:
            file.write_text(yaml.safe_dump(args, sort_keys=False))

    def tidy(self) -> None:
        """Remove what a killed run was writing when it died."""
        for name in (ARGS, SUMMARY, STATE, BEST, LAST):
            for scratch in self.path.glob(f".{name}.*"):
                shutil.rmtree(scratch, ignore_errors=True)

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the state; a full disk leaves the one before.

        Raises:
            OutputError: it cannot be written.
        """
        buffer = io.BytesIO()  # torch's own file writer hides the errno of a full disk
        torch.save(state, buffer)
        with writing(self.path / STATE, force=True) as file:
            file.write_bytes(buffer.getbuffer())

    def load_state(self) -> dict[str, Any] | None:
        """The state that was saved last, on the CPU; None if there is none.

        Raises:
            CheckpointError: it is damaged, or holds more than plain values.
        """
        if not (self.path / STATE).is_file():
            return None
        # Plain values alone are read; what else it meets, torch.load tells by pickle's own error.
        try:
            state = torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{str(self.path / STATE)!r} is damaged ({type(error).__name__}); start afresh "
                "with --force"
            ) from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{str(self.path / STATE)!r} is no state of a run")
        return state

    def save_model(self, model: nn.Module, name: str) -> Path:
        """Write the network as the compressed folder `name`."""
        return save(model, self.path / name, force=True)

    def write_summary(self, rows: list[dict[str, Any]]) -> None:
        """Write summary.csv as timm does, from all rows."""
        with writing(self.path / SUMMARY, force=True) as file:
            for number, row in enumerate(rows):
                update_summary(
                    row["epoch"], row["train"], row["eval"], file, row["lr"], number == 0
                )
