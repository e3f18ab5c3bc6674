"""Outputs are complete or absent: written elsewhere, renamed, and removed after any failure."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from legocompress import files
from legocompress.checkpoint.config import read_config
from legocompress.errors import CheckpointError, OutputError, OutputExistsError
from legocompress.files import (
    _exchange,
    _replace,
    check_free,
    explain_missing,
    write_atomically,
)


def fill(path: Path, text: str, folder: bool) -> None:
    (path / "inside" if folder else path).write_text(text)


def read(path: Path, folder: bool) -> str:
    return (path / "inside" if folder else path).read_text()


def fail(target: Path, folder: bool, error: type[BaseException]) -> None:
    with write_atomically(target, force=True, folder=folder) as path:
        fill(path, "half", folder)
        raise error


def assert_holds_only(folder: Path, *names: str) -> None:
    """Assert that a folder holds these names and nothing else, not even hidden files."""
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(names)


@pytest.fixture(params=[False, True], ids=["file", "folder"])
def folder(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_the_output_appears_only_at_the_end(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "deep" / "er" / "out"
    with write_atomically(target, folder=folder) as path:
        assert path.name == "out"
        assert path.parent.parent == target.parent  # the same disk, so that renaming is atomic
        assert path.is_dir() is folder
        fill(path, "new", folder)
        assert not target.exists()
    assert read(target, folder) == "new"
    assert_holds_only(target.parent, "out")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path: Path, folder: bool, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fail(tmp_path / "out", folder, error)
    assert_holds_only(tmp_path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_output(
    tmp_path: Path, folder: bool, error: type[BaseException]
) -> None:
    target = tmp_path / "out"
    with write_atomically(target, folder=folder) as path:
        fill(path, "old", folder)
    with pytest.raises(error):
        fail(target, folder, error)
    assert read(target, folder) == "old"
    assert_holds_only(tmp_path, "out")


def test_an_interrupt_between_the_two_renames_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target = tmp_path / "out"
    with write_atomically(target, folder=True) as path:
        fill(path, "old", True)

    def interrupt(frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        if frame.f_code is _replace.__code__:
            if event == "line" and not target.exists():
                sys.settrace(None)
                raise KeyboardInterrupt
            return interrupt
        return None

    before = sys.gettrace()
    try:
        sys.settrace(interrupt)
        with (
            pytest.raises(KeyboardInterrupt),
            write_atomically(target, force=True, folder=True) as path,
        ):
            fill(path, "new", True)
    finally:
        sys.settrace(before)
    assert read(target, True) in ("old", "new")
    assert_holds_only(tmp_path, "out")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems need two renames")
def test_a_folder_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    with write_atomically(target, folder=True) as path:
        fill(path, "old", True)
    try:
        exchanged = _exchange(tmp_path / "out", tmp_path)
    finally:
        assert read(target, True) == "old"
    assert not exchanged  # a folder and its parent cannot change places
    monkeypatch.setattr(os, "rename", lambda *paths: pytest.fail("the old folder was moved away"))
    with write_atomically(target, force=True, folder=True) as path:
        fill(path, "new", True)
    assert read(target, True) == "new"
    assert_holds_only(tmp_path, "out")


def test_a_kill_between_the_two_renames_is_explained(tmp_path: Path) -> None:
    target = tmp_path / "my out"
    with write_atomically(target, folder=True) as path:
        fill(path, "old", True)
    assert explain_missing(target) == ""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from legocompress import files\n"
        "files._exchange = lambda one, other: False\n"
        "os.replace = lambda one, other: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with files.write_atomically(Path(sys.argv[1]), force=True, folder=True) as path:\n"
        "    (path / 'inside').write_text('new')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, target], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    with pytest.raises(CheckpointError, match="restore it with `mv") as caught:
        read_config(target)
    subprocess.run(str(caught.value).split("`")[1], shell=True, check=True)
    assert read(target, True) == "old"
    assert explain_missing(target) == ""


def test_to_replace_an_output_needs_force(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "out"
    with write_atomically(target, folder=folder) as path:
        fill(path, "old", folder)
    with (
        pytest.raises(OutputExistsError, match=r"exists already.*--force"),
        write_atomically(target, folder=folder),
    ):
        pytest.fail("the body must not run")
    assert read(target, folder) == "old"
    with write_atomically(target, force=True, folder=folder) as path:
        fill(path, "new", folder)
        assert read(target, folder) == "old"
    assert read(target, folder) == "new"
    assert_holds_only(tmp_path, "out")


def test_a_folder_replaces_a_folder_with_more_files(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "sub").mkdir(parents=True)
    (target / "sub" / "old").write_text("x")
    with write_atomically(target, force=True, folder=True) as path:
        fill(path, "new", True)
    assert_holds_only(target, "inside")


def test_a_folder_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with write_atomically(tmp_path / "out", force=True, folder=True) as path:
        fill(path, "new", True)
    assert read(tmp_path / "out", True) == "new"
    assert_holds_only(tmp_path, "out")


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with (
        pytest.raises(OutputError, match="cannot write"),
        write_atomically(tmp_path / "out", force=True) as path,
    ):
        path.write_text("new")
    assert (tmp_path / "out" / "precious").read_text() == "x"
    assert_holds_only(tmp_path, "out")


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path, folder: bool) -> None:
    real = tmp_path / "real"
    with write_atomically(real, folder=folder) as path:
        fill(path, "old", folder)
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(OutputExistsError):
        check_free(tmp_path / "link", force=False)
    with write_atomically(tmp_path / "link", force=True, folder=folder) as path:
        fill(path, "new", folder)
    assert read(real, folder) == "old"
    assert read(tmp_path / "link", folder) == "new"
    assert_holds_only(tmp_path, "link", "real")


def test_a_broken_link_counts_as_an_output(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError):
        check_free(tmp_path / "link", force=False)
    check_free(tmp_path / "nowhere", force=False)


def test_a_file_where_the_parent_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(OutputError, match="cannot write"),
        write_atomically(tmp_path / "file" / "out"),
    ):
        pytest.fail("the body must not run")


def test_a_full_disk_has_a_message_of_its_own(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"no space left.*Free some space"),
        write_atomically(tmp_path / "a"),
    ):
        raise OSError(28, "No space left on device")
    with (
        pytest.raises(OutputError, match=r"cannot write .*: .*Input/output"),
        write_atomically(tmp_path / "a"),
    ):
        raise OSError(5, "Input/output error")
    assert_holds_only(tmp_path)


def test_an_output_of_another_process_is_not_replaced_without_force(
    tmp_path: Path, folder: bool
) -> None:
    target = tmp_path / "out"

    def write_while_another_writes() -> None:
        with write_atomically(target, folder=folder) as path:
            fill(path, "mine", folder)
            with write_atomically(target, folder=folder) as other:
                fill(other, "theirs", folder)

    with pytest.raises(OutputExistsError, match="exists already"):
        write_while_another_writes()
    assert read(target, folder) == "theirs"
    assert_holds_only(tmp_path, "out")


@pytest.mark.parametrize("moment", ["before", "between"])
def test_two_processes_that_replace_one_folder_at_once(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one moves the old folder away first, or puts its own between our two renames."""
    target = tmp_path / "out"
    with write_atomically(target, folder=True) as path:
        fill(path, "old", True)
    rename = os.rename
    calls: list[Path] = []

    def race(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == 1 and moment == "before":
            shutil.rmtree(target)
        rename(source, destination)
        if len(calls) == 1:
            target.mkdir()
            fill(target, "theirs", True)

    monkeypatch.setattr(os, "rename", race)
    with write_atomically(target, force=True, folder=True) as path:
        fill(path, "mine", True)
    assert read(target, True) == "mine"
    assert_holds_only(tmp_path, "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir(mode=0o555)
    try:
        with pytest.raises(OutputError, match="cannot write"), write_atomically(place / "out"):
            pytest.fail("the body must not run")
        assert_holds_only(place)
    finally:
        place.chmod(0o755)
