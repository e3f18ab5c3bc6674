"""Write outputs under a temporary name, then rename them, so that none is ever half written."""

from __future__ import annotations

import ctypes
import errno
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from legocompress.errors import OutputError, OutputExistsError, first_line

# How often to replace a folder that other processes replace at the same time.
ATTEMPTS = 20


def check_free(target: Path, force: bool) -> None:
    """Raise OutputExistsError if `target` exists and may not be replaced."""
    if not force and (target.exists() or target.is_symlink()):
        raise OutputExistsError(
            f"{str(target)!r} exists already; choose another --out, or replace it with --force"
        )


@contextmanager
def write_atomically(target: Path, force: bool = False, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `target` on success, otherwise remove it.

    Args:
        target: path of the output.
        force: replace an existing output.
        folder: the output is a folder; the temporary folder is created.

    Raises:
        OutputExistsError: `target` exists and `force` is not given.
        OutputError: the disk is full, or the path cannot be written.
    """
    check_free(target, force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _explain_failure(target, error) from error
    try:
        path = scratch / target.name
        if folder:
            path.mkdir()
        yield path
        check_free(target, force)  # another process may have written it meanwhile
        _replace_patiently(path, target, scratch)
    except (OSError, SafetensorError) as error:
        raise _explain_failure(target, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace_patiently(path: Path, target: Path, scratch: Path) -> None:
    """Replace `target`; try again if another process replaces the same folder at that moment."""
    for attempt in range(ATTEMPTS):
        try:
            return _replace(path, target, scratch / f"replaced{attempt}")
        except OSError as error:
            # The other process has moved the old folder away, or has put its own one there.
            raced = error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST)
            if not raced or not path.is_dir() or attempt == ATTEMPTS - 1:
                raise


def _replace(path: Path, target: Path, old: Path) -> None:
    """Move `path` to `target`; if that is interrupted, what was there before stays."""
    try:
        if path.is_dir() and target.exists():
            if _exchange(path, target):
                return
            # A folder cannot be renamed onto another path that exists, so move that away first.
            os.rename(target, old)
        os.replace(path, target)
    finally:
        if old.exists() and not target.exists():  # interrupted between the two renames
            os.rename(old, target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step where the system can (Linux); say whether it did."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    failed: int = rename(
        here, os.fsencode(one.absolute()), here, os.fsencode(other.absolute()), exchange
    )
    return failed == 0


def explain_missing(target: Path) -> str:
    """Say how to restore a folder that a killed process had moved away; '' if there is none."""
    if target.exists() or not target.parent.is_dir():
        return ""
    for scratch in sorted(target.parent.iterdir()):
        if scratch.name.startswith(f".{target.name}.") and scratch.is_dir():
            for old in sorted(scratch.glob("replaced*")):
                return (
                    "; a process was killed while it replaced the folder, which is left in another "
                    f"place: restore it with `mv {shlex.quote(str(old))} "
                    f"{shlex.quote(str(target))}`"
                )
    return ""


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the usual permissions, as the umask sets them."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors would let only the owner read it


def _explain_failure(target: Path, error: BaseException) -> OutputError:
    """Make the error that says whether the disk is full or the path cannot be written."""
    disk_full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    code = getattr(error, "errno", None)
    text = str(error)  # safetensors gives the number only in its text
    if code in disk_full or any(f"os error {number}" in text for number in disk_full):
        return OutputError(
            f"no space left to write {str(target)!r}; nothing was changed there. "
            "Free some space, or choose another --out"
        )
    return OutputError(f"cannot write {str(target)!r}: {first_line(error)}")
