"""Load weights from a state dict, and check every key and shape."""

from __future__ import annotations

from pathlib import Path

import safetensors
from timm.models import load_state_dict
from torch import Tensor, nn

from legocompress.errors import WeightsError, first_line


def load_weights_(model: nn.Module, path: Path) -> nn.Module:
    """Load a state dict file into `model`; every key and shape must match.

    Raises:
        WeightsError: the file is missing or unreadable, holds more than plain tensors, or does not
            fit the network.
    """
    if not path.is_file():
        raise WeightsError(f"weights file {str(path)!r} does not exist")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise WeightsError(
            f"weights file {str(path)!r} cannot be read as safetensors or as a torch state dict of "
            f"plain tensors: {first_line(error)}"
        ) from error
    except Exception as error:  # torch.load raises pickle's own errors for what is not tensors
        raise WeightsError(
            f"weights file {str(path)!r} holds more than plain tensors, which is not allowed: "
            f"{first_line(error)}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(
            f"weights file {str(path)!r} is not a state dict, which maps names to tensors"
        )
    load_state_(model, state, f"the weights in {str(path)!r}")
    return model


def load_state_(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load a state dict into `model`; `origin` names it in the error.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape.
    """
    own = model.state_dict()
    # Linear layers that are built as 1x1 convs (ConvNeXt) have the same values in another shape.
    fitted = {
        key: value.reshape(own[key].shape)
        if key in own and (*value.shape, 1, 1) == tuple(own[key].shape)
        else value
        for key, value in state.items()
    }
    missing = [k for k in own if k not in fitted and not k.endswith("num_batches_tracked")]
    unknown = [k for k in fitted if k not in own]
    shapes = [k for k in own if k in fitted and own[k].shape != fitted[k].shape]
    faults = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    if missing or unknown or shapes:
        told = "; ".join(
            f"{len(keys)} {what} (such as {_example(keys[0], own, fitted)})"
            for what, keys in faults.items()
            if keys
        )
        raise WeightsError(
            f"{origin} do not fit {type(model).__name__}: tensors {told}. Name the architecture "
            "that they were saved from, and --num-classes if its classifier is not the default"
        )
    # Update the state of the model, since MnasNet needs its version metadata.
    own.update(fitted)
    model.load_state_dict(own)


def _example(key: str, own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    if key in own and key in state:
        return f"{key}: {tuple(state[key].shape)} given, {tuple(own[key].shape)} expected"
    return key
