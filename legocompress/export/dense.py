"""Export a network as dense weights, which load without this package."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from legocompress.checkpoint import CONFIG, TENSORS, check_target, format_config, timm_config
from legocompress.errors import ExportError, LegoError
from legocompress.files import write_atomically, write_tensors
from legocompress.lego.surgery import to_dense
from legocompress.models.checks import check_network
from legocompress.models.factory import create
from legocompress.models.source import source_of


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the dense architecture, with assembled weights."""
    return to_dense(model).state_dict()


def export_dense(model: nn.Module, path: str | Path, force: bool = False) -> Path:
    """Write `dense_state` as a safetensors file that timm or torchvision load strictly.

    Args:
        model: the converted network.
        path: the file to write.
        force: replace an existing output.

    Raises:
        UsageError: the model is wrapped, compiled or scripted, or holds a lazy layer.
        OutputExistsError: the file exists and `force` is not given.
        OutputError: it cannot be written.
    """
    check_network(model)
    target = Path(path)
    with write_atomically(target, force) as temporary:
        write_tensors(_plain_state(model), temporary)
    return target


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    # Aliases of one tensor become copies, since strict loading asks for every name.
    return {name: t.detach().cpu().clone().contiguous() for name, t in dense_state(model).items()}


def export_timm(model: nn.Module, path: str | Path, force: bool = False) -> Path:
    """Write a dense network as a folder in timm's hub layout, with its preprocessing.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it without this package (timm up
    to 1.0.22 reads the safetensors of a local folder as pickle, and fails). The folder is loaded
    once, as a check, before it is renamed to `path`.

    Args:
        model: the converted network; its architecture must be one of timm.
        path: the folder to write.
        force: replace an existing output.

    Raises:
        UsageError: the model is wrapped, compiled or scripted, or holds a lazy layer.
        ExportError: timm does not build the network in this form, or loads other values from it.
        OutputExistsError: the folder exists and `force` is not given, or it holds other files.
        OutputError: it cannot be written.
    """
    check_network(model)
    source = source_of(model)
    if source.library != "timm":
        raise ExportError(
            f"timm has no {source.architecture or type(model).__name__}: this folder is for "
            "architectures of timm. --to dense writes the weights of any network"
        )
    if source.reparameterized:
        raise ExportError(
            f"{source.architecture} is fused, and timm builds its training "
            "form; load --to dense after timm.utils.reparameterize_model(model)"
        )
    config, state = timm_config(model, source), _plain_state(model)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    config["pretrained_cfg"].pop("custom_load", None)  # it is meant for files in other formats
    if first is not None and first.in_channels != 3:
        config["pretrained_cfg"]["first_conv"] = (
            None  # else timm converts the weights from three channels
        )
    target = Path(path)
    check_target(target, force)
    with write_atomically(target, force, folder=True) as folder:
        write_tensors(state, folder / TENSORS)
        (folder / CONFIG).write_text(format_config(config))
        _check_loads(folder, state, str(source.architecture))
    return target


def _check_loads(folder: Path, state: dict[str, Tensor], architecture: str) -> None:
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            loaded = create(f"local-dir:{folder}")
    except LegoError as error:
        raise ExportError(f"timm does not load {architecture} from a folder: {error}") from error
    loaded_state = loaded.state_dict()
    wrong = sorted(loaded_state.keys() ^ state.keys()) or [
        name
        for name, t in state.items()
        if not torch.equal(loaded_state[name], t.to(loaded_state[name].dtype))
    ]
    if wrong:
        raise ExportError(
            f"timm loads other values of {architecture} from a folder, the first in {wrong[0]!r}; "
            "use --to dense"
        )
