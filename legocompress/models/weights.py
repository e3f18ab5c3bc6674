"""Load weights from a file or a state dict; every key and shape must match."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from legocompress.errors import WeightsError
from legocompress.models.weights_file import (
    StateDict,
    describe_content,
    list_state_dicts,
    read_weights_file,
)

# Last parts of names that other tools add to a state dict: AveragedModel of torch, and thop.
COUNTERS = frozenset(["n_averaged", "total_ops", "total_params"])
MAX_MISFITS = 2


@dataclass(frozen=True)
class Fit:
    """How the tensors of a state dict fit a network, after `prefix` was taken off every name.

    `tensors` have the network's names. `faults` counts those that are missing, unknown or of
    another shape, with an example of each; it is empty if there are none.
    """

    prefix: str
    tensors: dict[str, Tensor]
    n_fitting: int
    faults: str

    @property
    def is_whole(self) -> bool:
        """Whether every tensor of the network is there, and every tensor is used."""
        return not self.faults


def load_weights_(model: nn.Module, path: Path) -> nn.Module:
    """Load the one state dict in a file that fits `model`; every key and shape must match.

    The file may hold the state dict itself, or hold it up to three keys deep beside other things,
    as training scripts save it. One prefix that all names have in common, such as `module.`, is
    taken off. Averaged weights (EMA) are preferred to the others. A log line says what was taken.

    Raises:
        WeightsError: the file is missing or unreadable, holds objects other than tensors and plain
            values, or holds no state dict that fits the network, or several different ones.
    """
    content = read_weights_file(path)
    states = list_state_dicts(content)
    if not states:
        raise WeightsError(
            f"weights file {str(path)!r} is not a state dict, which maps names to tensors, and "
            f"holds none; it holds {describe_content(content)}"
        )
    model_state = model.state_dict()
    fits = [(state, _find_fit(model_state, state.tensors)) for state in states]
    whole = [(state, fit) for state, fit in fits if fit.is_whole]
    if not whole:
        raise WeightsError(_explain_misfits(model, path, content, fits))
    state, fit = _choose(whole, path)
    if state.keys or fit.prefix:
        logging.getLogger("legocompress").warning(_describe_choice(path, state, fit, whole))
    _assign_(model, model_state, fit)
    return model


def load_state_(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Load a state dict into `model`; `origin` names it in the error.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape.
    """
    model_state = model.state_dict()
    fit = _fit(model_state, state, "")
    if not fit.is_whole:
        raise WeightsError(_explain_misfit(model, origin, fit))
    _assign_(model, model_state, fit)


def _assign_(model: nn.Module, model_state: dict[str, Tensor], fit: Fit) -> None:
    # Update the state of the model, since MnasNet needs its version metadata.
    model_state.update(fit.tensors)
    model.load_state_dict(model_state)


def _find_fit(model_state: dict[str, Tensor], tensors: dict[str, Tensor]) -> Fit:
    """The best fit over all prefixes that end in a dot and that all names have in common."""
    names = [name.split(".") for name in tensors if not _is_counter(name)]
    prefixes = [""]
    # The last part of a name is never a prefix; a prefix is at most as long as the shortest name.
    for parts in zip(*(name[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        prefixes.append(f"{prefixes[-1]}{parts[0]}.")
    fits = [_fit(model_state, tensors, prefix) for prefix in prefixes]
    return max(fits, key=lambda fit: (fit.is_whole, fit.n_fitting))


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in COUNTERS


def _fit(model_state: dict[str, Tensor], tensors: dict[str, Tensor], prefix: str) -> Fit:
    """Compare names without `prefix`, and shapes, with those of the network."""
    stripped = {name.removeprefix(prefix): value.detach() for name, value in tensors.items()}
    renamed = {k: v for k, v in stripped.items() if k in model_state or not _is_counter(k)}
    # Linear layers that are built as 1x1 convs (ConvNeXt) have the same values in another shape.
    fitted = {
        key: value.reshape(model_state[key].shape)
        if key in model_state and (*value.shape, 1, 1) == tuple(model_state[key].shape)
        else value
        for key, value in renamed.items()
    }
    missing = [k for k in model_state if k not in fitted and not k.endswith("num_batches_tracked")]
    unknown = [k for k in fitted if k not in model_state]
    shapes = [k for k in model_state if k in fitted and model_state[k].shape != fitted[k].shape]
    faults = "; ".join(
        f"{len(keys)} {what} (such as {_example(keys[0], model_state, fitted)})"
        for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if keys
    )
    n_fitting = len(fitted) - len(unknown) - len(shapes)
    return Fit(prefix, fitted, n_fitting, faults)


def _example(key: str, model_state: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    if key in model_state and key in state:
        return f"{key}: {tuple(state[key].shape)} given, {tuple(model_state[key].shape)} expected"
    return key


def _choose(whole: list[tuple[StateDict, Fit]], path: Path) -> tuple[StateDict, Fit]:
    """Averaged weights if there are any, else the plain ones.

    Raises:
        WeightsError: several state dicts of different values are equally good.
    """
    rank = max(state.rank for state, _ in whole)
    best, *others = [pair for pair in whole if pair[0].rank == rank]
    rivals = [state.label for state, fit in others if not _are_equal(best[1].tensors, fit.tensors)]
    if rivals:
        keys = "".join(f"[{key!r}]" for key in others[0][0].keys)
        raise WeightsError(
            f"weights file {str(path)!r} holds several state dicts that fit: "
            f"{', '.join([best[0].label, *rivals])}. Save the one that you mean alone: "
            f"torch.save(torch.load({str(path)!r}){keys}, 'weights.pth')"
        )
    return best


def _are_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def _describe_choice(
    path: Path, state: StateDict, fit: Fit, whole: list[tuple[StateDict, Fit]]
) -> str:
    text = f"weights: {state.label} of {path}" if state.keys else f"weights: {path}"
    if fit.prefix:
        text += f", prefix {fit.prefix!r} removed"
    others = [
        other.label or "the names at the top" for other, _ in whole if other.rank < state.rank
    ]
    if others and state.rank == 2:
        text += f"; averaged weights (EMA) are preferred to {', '.join(others)}"
    return text


def _explain_misfits(
    model: nn.Module, path: Path, content: object, fits: list[tuple[StateDict, Fit]]
) -> str:
    """Say how the nearest state dicts of a file misfit, and what else the file holds."""
    nearest = sorted(fits, key=lambda pair: -pair[1].n_fitting)
    (first, fit), *others = nearest[:MAX_MISFITS]
    if not first.keys and not fit.prefix and len(fits) == 1:
        return _explain_misfit(model, f"the weights in {str(path)!r}", fit)
    text = _explain_misfit(model, f"the weights {_locate(first, fit)} in {str(path)!r}", fit)
    for state, other in others:
        if other.n_fitting:
            text += f". Neither do {_locate(state, other)}: {other.faults}"
    return f"{text}. The file holds {describe_content(content)}"


def _locate(state: StateDict, fit: Fit) -> str:
    return f"{state.label} (without the prefix {fit.prefix!r})" if fit.prefix else state.label


def _explain_misfit(model: nn.Module, origin: str, fit: Fit) -> str:
    return (
        f"{origin} do not fit {type(model).__name__}: tensors {fit.faults}. Name the architecture "
        "that they were saved from, and --num-classes if its classifier is not the default"
    )
