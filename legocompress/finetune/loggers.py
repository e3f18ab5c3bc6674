"""The numbers of a run, sent to the experiment tracker that the user has installed."""

from __future__ import annotations

import importlib
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from legocompress.errors import OutputError, UsageError


class Logger(Protocol):
    """Where the numbers of a run go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record numbers by name, such as `train/loss`, at a step (an epoch, from 1)."""

    def close(self) -> None:
        """Finish the run."""


class JsonLines:
    """One JSON object per line; each holds its time (seconds since 1970) and an `event`.

    Args:
        stream: the open text file to write to.
    """

    def __init__(self, stream: IO[str]):
        self.stream = stream

    def write(self, event: str, **fields: Any) -> None:
        """Write one line, so that a reader of the file has it at once.

        Raises:
            OutputError: the line cannot be written, such as on a full disk.
        """
        line = {"time": round(time.time(), 3), "event": event, **fields}
        try:
            self.stream.write(json.dumps(line, default=str) + "\n")
            self.stream.flush()
        except BrokenPipeError:  # the reader has gone, which ends a command without a message
            raise
        except OSError as error:
            raise OutputError(f"the log of JSON lines cannot be written: {error}") from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a line of the event `metrics`."""
        self.write("metrics", step=step, metrics=dict(metrics))

    def close(self) -> None:
        """Do nothing: who has opened the stream closes it."""


class _Tracker(ABC):
    """A tracker whose run is opened at the first numbers, when the run's folder exists.

    Args:
        folder: the folder of the run.
        settings: what the run was started with.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder, self.settings = folder, dict(settings)
        self.run: Any = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send numbers by name at a step."""
        if self.run is None:
            self.run = self._open()
        self._send(step, dict(metrics))

    def close(self) -> None:
        """Finish the run, if it was opened."""
        if self.run is not None:
            self._finish()
            self.run = None

    @abstractmethod
    def _open(self) -> Any:
        """Start a run of the tracker, and return it."""

    @abstractmethod
    def _send(self, step: int, metrics: dict[str, float]) -> None:
        """Send numbers to the open run."""

    @abstractmethod
    def _finish(self) -> None:
        """End the open run."""


class TensorBoard(_Tracker):
    """Writes events into `tensorboard/` of the run's folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        super().__init__(folder, settings)
        _import("tensorboard", "tensorboard")
        self.library = _import("torch.utils.tensorboard", "tensorboard")

    def _open(self) -> Any:
        return self.library.SummaryWriter(str(self.folder / "tensorboard"))

    def _send(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.run.add_scalar(name, value, step)
        self.run.flush()

    def _finish(self) -> None:
        self.run.close()


class WeightsAndBiases(_Tracker):
    """Logs to Weights & Biases, in the project `legocompress` or that of WANDB_PROJECT."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        super().__init__(folder, settings)
        self.library = _import("wandb", "wandb")

    def _open(self) -> Any:
        project = os.environ.get("WANDB_PROJECT", "legocompress")
        return self.library.init(
            project=project, name=self.folder.name, dir=str(self.folder), config=self.settings
        )

    def _send(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def _finish(self) -> None:
        self.run.finish()


class MLflow(_Tracker):
    """Logs to the MLflow server and experiment that MLflow's own environment variables name."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        super().__init__(folder, settings)
        self.library = _import("mlflow", "mlflow")

    def _open(self) -> Any:
        run = self.library.start_run(run_name=self.folder.name)
        self.library.log_params({name: str(value) for name, value in self.settings.items()})
        return run

    def _send(self, step: int, metrics: dict[str, float]) -> None:
        self.library.log_metrics(metrics, step=step)

    def _finish(self) -> None:
        self.library.end_run()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def open_logger(name: str, folder: str | Path, settings: Mapping[str, Any]) -> Logger:
    """Open the tracker of a name for one run; `finetune_` gives it numbers by `on_epoch`.

    Args:
        name: `tensorboard`, `wandb` or `mlflow`.
        folder: the folder of the run, whose name becomes the run's name.
        settings: what the run was started with, for the tracker's record.

    Raises:
        UsageError: there is no such tracker, or its package is not installed.
    """
    if name not in TRACKERS:
        raise UsageError(f"no logger {name!r}; allowed are {', '.join(TRACKERS)}")
    return TRACKERS[name](Path(folder), settings)


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"logging to {extra} needs a package: pip install 'legocompress[{extra}]'"
        ) from error
