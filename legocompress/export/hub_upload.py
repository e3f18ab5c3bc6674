"""Upload a compressed folder to the Hugging Face hub, with a model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError
from torch import nn

from legocompress.checkpoint import load
from legocompress.checkpoint.hub import FILES
from legocompress.errors import OutputError, UsageError, first_line
from legocompress.lego.module import lego_modules
from legocompress.models.probe import model_cfg
from legocompress.models.source import source_of
from legocompress.report.measurement import measure
from legocompress.report.results import Report
from legocompress.state.conversion import ConversionRecord
from legocompress.state.model_state import lego_state

CARD = "README.md"
MESSAGE = "Add a network compressed with Lego filters"


def push(
    folder: str | Path,
    repo: str,
    private: bool = False,
    message: str = MESSAGE,
    token: str | None = None,
    model: nn.Module | None = None,
) -> str:
    """Upload a compressed folder to the hub, where `load("hf-hub:USER/REPO")` finds it.

    The folder is loaded first, so that no damaged folder is uploaded. A model card is written from
    its report, unless the repository has one.

    Args:
        folder: a folder that `save` wrote.
        repo: USER/REPO; created if it does not exist.
        private: whether a new repository is private.
        message: of the commit.
        token: of the hub; by default the one of `hf auth login`.
        model: a fresh dense instance if the network is your own, as `load` takes it.

    Returns:
        The repository's address.

    Raises:
        UsageError: the name is not the name of a repository.
        CheckpointError: the folder is damaged.
        OutputError: the hub refuses, or cannot be reached.
    """
    path = Path(folder)
    card = model_card(path, repo, model)
    api = HfApi(token=token, library_name="legocompress")
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as place:
            for name in FILES:
                (Path(place) / name).symlink_to((path / name).resolve())
            if not api.file_exists(url.repo_id, CARD):
                (Path(place) / CARD).write_text(card, encoding="utf-8")
            api.upload_folder(repo_id=url.repo_id, folder_path=place, commit_message=message)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is not the name of a repository, USER/REPO: {error}") from error
    # Network errors of the library have different base classes in different versions.
    except Exception as error:
        raise OutputError(
            f"cannot push to {repo!r}: {first_line(error)}. Log in with `hf auth login`, or pass a "
            "token that may write there"
        ) from error
    return str(url)


def model_card(folder: str | Path, repo: str, model: nn.Module | None = None) -> str:
    """Write the model card of a compressed folder: what it is, its totals, how to load it.

    Raises:
        CheckpointError: the folder is damaged.
    """
    network = load(folder, model)
    report = measure(network, path=folder)
    source, record = source_of(network), lego_state(network).conversion
    cfg = model_cfg(network)
    origin = " ".join(source.weights.split())
    base = origin.partition(":")[2] if origin.startswith(("hf-hub:", "hf_hub:")) else None
    data = ModelCardData(
        library_name="legocompress",
        tags=["legocompress", *([source.library] if source.library else [])],
        pipeline_tag="image-classification" if getattr(network, "num_classes", 0) else None,
        base_model=base,
        license=cfg.get("license") if isinstance(cfg.get("license"), str) else None,
    )
    name = source.architecture or type(model).__name__
    converted = len(list(lego_modules(network)))
    settings = ""
    if isinstance(record, ConversionRecord):
        spec = record.spec
        settings = f", at m={spec.m:g}, o={spec.o}, k={spec.k}, filters in {spec.dtype}"
    instance = "" if source.library else ", model=YourNetwork()"
    return f"""---
{data.to_yaml()}
---
# {repo.rpartition("/")[2]}

`{name}` compressed by legocompress: {converted} layers are built of shared Lego filters
(LegoNet, Yang et al., ICML 2019){settings}. The original weights: {origin}.

{_table(report)}

Params, ideal size and MACs are computed, the stored size is that of the files. Accuracy is not part
of this report; measure it with `legocompress evaluate`.

```python
import legocompress as lego

model = lego.load("hf-hub:{repo}"{instance})
```
"""


def _table(report: Report) -> str:
    totals: dict[str, Any] = report.totals()
    stored = 8 * (totals["stored_bytes"] or 0)
    rows = [
        ("params", totals["dense_params"], totals["params"], 1e6, "M"),
        ("ideal size", totals["dense_bits"], totals["bits"], 8e6, " MB"),
        ("stored size", totals["dense_bits"], stored, 8e6, " MB"),
        ("MACs", totals["dense_macs"], totals["macs"], 1e9, "G"),
    ]
    lines = ["| | dense | compressed | ratio |", "|---|---|---|---|"]
    for name, before, after, unit, letter in rows:
        if after:
            lines.append(
                f"| {name} | {before / unit:.2f}{letter} | {after / unit:.2f}{letter} "
                f"| {before / after:.2f}x |"
            )
    return "\n".join(lines)
