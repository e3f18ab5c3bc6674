"""Outputs that are never half written: built under a temporary name, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from legocompress.errors import OutputError, OutputExistsError, first_line


def check_free(target: Path, force: bool) -> None:
    """Raise OutputExistsError if something stands at `target` and may not be replaced."""
    if not force and (target.exists() or target.is_symlink()):
        raise OutputExistsError(
            f"{str(target)!r} exists already; choose another --out, or replace it with --force"
        )


@contextmanager
def writing(target: Path, force: bool = False, folder: bool = False) -> Iterator[Path]:
    """Give a temporary path to write; on success it takes the place of `target`, else it goes.

    Args:
        target: where the output is to stand.
        force: replace what stands there.
        folder: the output is a folder, which is made.

    Raises:
        OutputExistsError: something stands at `target` and `force` is not given.
        OutputError: the disk is full or the place cannot be written.
    """
    check_free(target, force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _explained(target, error) from error
    try:
        path = scratch / target.name
        if folder:
            path.mkdir()
        yield path
        _replace(path, target, scratch)
    except (OSError, SafetensorError) as error:
        raise _explained(target, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace(path: Path, target: Path, scratch: Path) -> None:
    old = scratch / "replaced"
    try:
        if path.is_dir() and target.exists():
            # A folder cannot be renamed onto another; the old one leaves in the same breath.
            os.rename(target, old)
        os.replace(path, target)
    finally:
        if old.exists() and not target.exists():  # interrupted between the two
            os.rename(old, target)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that others may read, as far as the umask lets them."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # the library leaves it to the owner alone


def _explained(target: Path, error: BaseException) -> OutputError:
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    code = getattr(error, "errno", None)
    text = str(error)
    if code in full or any(f"os error {number}" in text for number in full):
        return OutputError(
            f"no space left to write {str(target)!r}; nothing was changed there. "
            "Free some space, or choose another --out"
        )
    return OutputError(f"cannot write {str(target)!r}: {first_line(error)}")
