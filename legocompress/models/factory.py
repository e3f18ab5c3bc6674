"""Create dense networks from timm, torchvision, a hub, a folder or a file."""

from __future__ import annotations

import inspect
import logging
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from legocompress.errors import LegoError, ModelNameError, UsageError, WeightsError, first_line
from legocompress.models.preprocessing import (
    adapt_to_channels,
    check_preprocessing,
    fit_preprocessing,
    torchvision_cfg,
)
from legocompress.models.probe import model_cfg
from legocompress.models.resolution import explain_unknown_name, list_names, resolve
from legocompress.models.weights import load_state_, load_weights_
from legocompress.state.model_state import lego_state
from legocompress.state.source import Source

# Arguments of the library's factory functions. A file must not be able to set any of them.
FACTORY_ARGS = frozenset(
    [
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "scriptable",
        "exportable",
        "no_jit",
        "weights",
        "weights_backbone",
        "progress",
        "device",
        "dtype",
    ]
)
# Detectors that have other norm layers with pretrained weights than without.
FROZEN_NORMS = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos")
# Heads that googlenet and inception_v3 have only while they train.
AUXILIARY = frozenset(["aux1", "aux2", "AuxLogits"])


def create(
    name: str,
    weights: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    in_chans: int | None = None,
    model_args: dict[str, Any] | None = None,
    preprocess: dict[str, Any] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Create a dense network with its weights and preprocessing, in eval mode.

    Args:
        name: `resnet50` (timm's where both have it), `timm/NAME`, `torchvision/NAME`,
            `hf-hub:USER/REPO`, or `local-dir:FOLDER`.
        weights: a file (safetensors, or torch loaded with weights_only) that is or contains a state
            dict of the network, instead of the library's own weights; see `load_weights_`.
        pretrained: load the library's weights; False leaves them random, by `seed`.
        num_classes: outputs of the classifier, where not the architecture's default.
        in_chans: channels of the image (timm only).
        model_args: further arguments of the architecture.
        preprocess: entries laid over the model's `pretrained_cfg` (input_size, mean, std,
            interpolation, crop_pct, ...). An `input_size` may be (H, W), and `mean` and `std` one
            value for all channels.
        seed: of random weights.

    Raises:
        ModelNameError: no library knows the name.
        UsageError: an argument does not fit the architecture.
        WeightsError: the weights cannot be loaded, or do not fit.
    """
    source, cfg = resolve(name)
    args = {"num_classes": num_classes, "in_chans": in_chans, **(model_args or {})}
    chosen_args = {key: value for key, value in args.items() if value is not None}
    source = replace(source, model_args={**source.model_args, **chosen_args})
    fetch = pretrained and weights is None
    _check_args(source)
    for what, least in (("num_classes", 0), ("in_chans", 1)):
        if chosen_args.get(what, least) < least:
            raise UsageError(
                f"{what}={chosen_args[what]} cannot be used; it must be at least {least}"
            )
    check_preprocessing(preprocess or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _download(name, source, cfg) if fetch else build(source)
    if weights is not None:
        load_weights_(model, Path(weights))
    origin = f"file {Path(weights).name}" if weights else name if fetch else f"random, seed {seed}"
    network: Any = model
    base = adapt_to_channels(cfg or model_cfg(model), in_chans)
    network.pretrained_cfg = {**base, **fit_preprocessing(preprocess or {}, base, in_chans)}
    lego_state(model).source = replace(source, weights=origin)
    return model.eval()


def _check_args(source: Source) -> None:
    bad = FACTORY_ARGS & source.model_args.keys()
    if bad:
        raise UsageError(
            f"{', '.join(sorted(bad))} cannot be given as an argument of {source.architecture}"
        )


def build(source: Source) -> nn.Module:
    """Build a source's architecture without pretrained weights.

    A torchvision network gets a `pretrained_cfg` in timm's form.

    Raises:
        ModelNameError: the architecture is unknown.
        UsageError: its arguments do not fit.
    """
    assert source.library is not None
    assert source.architecture is not None
    names = list_names(source.library)
    if source.architecture.partition(".")[0] not in names:
        raise ModelNameError(explain_unknown_name(source.architecture, names))
    _check_args(source)
    try:
        if source.library == "timm":
            model = timm.create_model(source.architecture, pretrained=False, **source.model_args)
        else:
            model = _torchvision(source.architecture, source.model_args)
    except LegoError:
        raise
    # An architecture may refuse an argument with any kind of exception.
    except Exception as error:
        raise UsageError(_unbuildable(source, error)) from error
    return model  # type: ignore[no-any-return]


def _unbuildable(source: Source, error: BaseException) -> str:
    return (
        f"{source.library}/{source.architecture} cannot be built with arguments "
        f"{source.model_args}: {first_line(error)}"
    )


def _download(name: str, source: Source, cfg: dict[str, Any] | None) -> nn.Module:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    assert source.library is not None
    assert source.architecture is not None
    try:
        if source.library == "timm":
            origin = name if cfg is not None else source.architecture
            pretrained_cfg = None
            if cfg is not None and cfg.get("source") == "local-dir":
                # Pass the file itself: older timm reads safetensors in a folder as pickle.
                origin, pretrained_cfg = (
                    source.architecture,
                    {**cfg, "source": "", "file": _weights_in(cfg)},
                )
            return timm.create_model(  # type: ignore[no-any-return]
                origin, pretrained=True, pretrained_cfg=pretrained_cfg, **source.model_args
            )
        if source.architecture.partition("_")[0] in FROZEN_NORMS:
            raise WeightsError(
                f"torchvision's pretrained {source.architecture} has frozen norms, which are not "
                "rebuilt from its name; create it with torchvision, convert it in Python, pass a "
                "fresh one to load()"
            )
        model = build(source)
        entry = torchvision.models.get_model_weights(source.architecture).DEFAULT
        with redirect_stdout(StringIO()):  # torch prints to stdout, where our JSON goes
            state = entry.get_state_dict(progress=False, check_hash=True)
        main_state = {k: v for k, v in state.items() if k.partition(".")[0] not in AUXILIARY}
        load_state_(model, main_state, f"torchvision's {entry}")
        return model
    except LegoError:
        raise
    except (TypeError, AttributeError, AssertionError, ArithmeticError) as error:
        raise UsageError(_unbuildable(source, error)) from error
    # Downloads and files fail in many ways: network, safetensors, pickle.
    except Exception as error:
        raise WeightsError(
            f"the pretrained weights of {name!r} cannot be loaded: {first_line(error)}. "
            "Give a local file with --weights FILE, or take random weights with --no-pretrained"
        ) from error


def _weights_in(cfg: dict[str, Any]) -> str:
    """Find the weights file in a local folder of timm's layout."""
    folder = Path(cfg["file"])
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (folder / file).is_file():
            return str(folder / file)
    raise FileNotFoundError("the folder has neither model.safetensors nor pytorch_model.bin")


def _torchvision(name: str, args: dict[str, Any]) -> nn.Module:
    if "in_chans" in args:
        raise UsageError(f"torchvision/{name} takes no in_chans; only timm's models do")
    builder = torchvision.models.get_model_builder(name)
    # Detection and segmentation networks download an ImageNet backbone unless told not to.
    backbone = {"weights_backbone": None}
    extra = backbone if "weights_backbone" in inspect.signature(builder).parameters else {}
    model = builder(weights=None, **extra, **args)
    model.pretrained_cfg = torchvision_cfg(name)
    return model  # type: ignore[no-any-return]
