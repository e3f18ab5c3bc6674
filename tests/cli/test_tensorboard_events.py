"""TensorBoard events of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from legocompress_cli.tensorboard_events import open_event_writer

from legocompress.errors import UsageError


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UsageError, match=r"legocompress\[tensorboard\]"):
        open_event_writer(tmp_path)
