"""Download compressed folders from the Hugging Face hub, into the cache of the hub."""

from __future__ import annotations

import logging
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from legocompress.errors import CheckpointError, UsageError, first_line

FILES = ("config.json", "model.safetensors")
SCHEMES = ("hf-hub", "hf_hub")


def is_hub_name(name: str | Path) -> bool:
    """Whether a name is `hf-hub:USER/REPO`, with or without `@REVISION`."""
    return str(name).partition(":")[0] in SCHEMES


def local_folder(name: str | Path, files: tuple[str, ...] = FILES) -> Path:
    """Return the folder of a compressed network: the path itself, or a download from the hub.

    Args:
        name: a path, or `hf-hub:USER/REPO` or `hf-hub:USER/REPO@REVISION`.
        files: which files to download.

    Raises:
        UsageError: the hub name is malformed.
        CheckpointError: the hub has no such repository or file, or cannot be reached.
    """
    if not is_hub_name(name):
        return Path(name)
    repo, _, revision = str(name).partition(":")[2].partition("@")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    path = Path()
    try:
        for file in files:
            path = Path(hf_hub_download(repo, file, revision=revision or None))
    except HFValidationError as error:
        raise UsageError(f"{str(name)!r} is not of the form hf-hub:USER/REPO: {error}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no repository {repo!r}, or it is private: log in with `hf auth login`"
        ) from error
    except EntryNotFoundError as error:
        raise CheckpointError(
            f"{str(name)!r} has no {file} on the hub, or the hub cannot be reached and the file is "
            "not in its cache"
        ) from error
    # Network errors of the library have different base classes in different versions.
    except Exception as error:
        raise CheckpointError(f"{str(name)!r} cannot be fetched: {first_line(error)}") from error
    return path.parent
