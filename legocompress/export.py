"""What leaves the toolkit: the network as dense weights that need nothing of this package."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import Tensor, nn

from legocompress.conv import to_dense_
from legocompress.files import write_tensors, writing


def to_dense(model: nn.Module) -> nn.Module:
    """Copy a converted network with every Lego module turned back into an ordinary layer."""
    return to_dense_(copy.deepcopy(model))


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the dense architecture, with assembled weights under the original names."""
    return to_dense(model).state_dict()


def export_dense(model: nn.Module, path: str | Path, force: bool = False) -> Path:
    """Write `dense_state` as a safetensors file that timm or torchvision load strictly.

    Args:
        model: the converted network.
        path: the file to write.
        force: replace what stands there.

    Raises:
        OutputExistsError: the file exists and `force` is not given.
        OutputError: it cannot be written.
    """
    target = Path(path)
    # Aliases of one tensor become copies: strict loading asks for every name.
    state = {name: t.detach().cpu().clone().contiguous() for name, t in dense_state(model).items()}
    with writing(target, force) as temporary:
        write_tensors(state, temporary)
    return target
