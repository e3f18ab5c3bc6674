"""Where models come from (timm, torchvision, hub, folder, file), with their preprocessing."""

from __future__ import annotations

import difflib
import inspect
import logging
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torchvision
from timm.models import load_model_config_from_hf
from timm.models._hub import load_model_config_from_path
from torch import nn
from torchvision.transforms import InterpolationMode

from legocompress.errors import LegoError, ModelNameError, UsageError, WeightsError, first_line
from legocompress.probe import model_cfg
from legocompress.weights import load_state_, load_weights_

Library = Literal["timm", "torchvision"]
# Arguments of the factories, not of an architecture: none of these may come from a file.
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
PREPROCESSING = (
    "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "fixed_input_size",
)  # fmt: skip
# Detectors whose pretrained form has other norm layers than the one without weights.
FROZEN_NORMS = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos")
# Heads that googlenet and inception_v3 have in training alone.
AUXILIARY = frozenset(["aux1", "aux2", "AuxLogits"])


@dataclass(frozen=True)
class Source:
    """What rebuilds a network without its weights: library, architecture and arguments.

    `library` is None for a network of the user's own. `weights` is prose for the record.
    """

    library: Library | None
    architecture: str | None
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str = "unknown"
    reparameterized: bool = False


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
        weights: a state dict file (safetensors, or torch loaded with weights_only) instead of the
            library's own weights.
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
        WeightsError: the weights cannot be had, read, or do not fit.
    """
    source, cfg = _resolve(name)
    args = {"num_classes": num_classes, "in_chans": in_chans, **(model_args or {})}
    given = {key: value for key, value in args.items() if value is not None}
    source = replace(source, model_args={**source.model_args, **given})
    fetch = pretrained and weights is None
    _check_args(source)
    for what, least in (("num_classes", 0), ("in_chans", 1)):
        if given.get(what, least) < least:
            raise UsageError(f"{what}={given[what]} cannot be: it is at least {least}")
    _check_preprocess(preprocess or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _download(name, source, cfg) if fetch else build(source)
    if weights is not None:
        load_weights_(model, Path(weights))
    origin = f"file {Path(weights).name}" if weights else name if fetch else f"random, seed {seed}"
    noted: Any = model
    base = _of_channels(cfg or model_cfg(model), in_chans)
    noted.pretrained_cfg = {**base, **_fitted(preprocess or {}, base, in_chans)}
    noted.lego_source = replace(source, weights=origin)
    return model.eval()


def _of_channels(cfg: dict[str, Any], channels: int | None) -> dict[str, Any]:
    """A configuration for images of so many channels; the mean of a grey one is the average."""
    size = cfg.get("input_size")
    if channels is None or not size or size[0] == channels:
        return cfg
    averages = {
        key: (sum(cfg[key]) / len(cfg[key]),) * channels for key in ("mean", "std") if cfg.get(key)
    }
    return {**cfg, **averages, "input_size": (channels, *size[1:])}


def _fitted(changes: dict[str, Any], cfg: dict[str, Any], in_chans: int | None) -> dict[str, Any]:
    """Preprocessing for the network's channels: a size of two numbers, one mean for all of them."""
    size = tuple(changes.get("input_size") or cfg.get("input_size") or ())
    channels = size[0] if len(size) == 3 else (cfg.get("input_size") or (in_chans or 3,))[0]
    fitted = dict(changes)
    if "input_size" in changes:
        fitted["input_size"] = size if len(size) == 3 else (channels, *size)
    for key in {"mean", "std"} & changes.keys():
        given = tuple(changes[key])
        fitted[key] = given * channels if len(given) == 1 else given
        if len(fitted[key]) != channels:
            raise UsageError(
                f"{key} (--{key}) has {len(given)} values; give one, or one for each of the "
                f"{channels} channels"
            )
    return fitted


def _check_preprocess(changes: dict[str, Any]) -> None:
    unknown = changes.keys() - {*PREPROCESSING, "test_input_size", "test_crop_pct"}
    if unknown:
        raise UsageError(
            f"unknown preprocessing {', '.join(sorted(unknown))}; "
            f"allowed are {', '.join(PREPROCESSING)}"
        )
    known = sorted(mode.value for mode in InterpolationMode)
    if changes.get("interpolation", "bilinear") not in (*known, "random"):
        raise UsageError(
            f"interpolation={changes['interpolation']!r}; allowed are {', '.join(known)}"
        )


def _check_args(source: Source) -> None:
    bad = FACTORY_ARGS & source.model_args.keys()
    if bad:
        raise UsageError(
            f"{', '.join(sorted(bad))} cannot be given as an argument of {source.architecture}"
        )


def build(source: Source) -> nn.Module:
    """Build a source's architecture without pretrained weights.

    A torchvision network gets a `pretrained_cfg` as timm's have it.

    Raises:
        ModelNameError: the architecture is unknown.
        UsageError: its arguments do not fit.
    """
    assert source.library is not None
    assert source.architecture is not None
    names = _names(source.library)
    if source.architecture.partition(".")[0] not in names:
        raise ModelNameError(_unknown(source.architecture, names))
    _check_args(source)
    try:
        if source.library == "timm":
            model = timm.create_model(source.architecture, pretrained=False, **source.model_args)
        else:
            model = _torchvision(source.architecture, source.model_args)
    except LegoError:
        raise
    # An architecture may refuse an argument in any way: attributes, divisions, missing modules.
    except Exception as error:
        raise UsageError(_unbuildable(source, error)) from error
    return model  # type: ignore[no-any-return]


def _unbuildable(source: Source, error: BaseException) -> str:
    return (
        f"{source.library}/{source.architecture} cannot be built with arguments "
        f"{source.model_args}: {first_line(error)}"
    )


def source_of(model: nn.Module) -> Source:
    """What rebuilds `model`: what `create` noted, else what timm noted, else a source of None."""
    source = getattr(model, "lego_source", None)
    if not isinstance(source, Source):
        architecture = model_cfg(model).get("architecture")
        if not architecture or not type(model).__module__.startswith("timm."):
            return Source(None, None)
        source = Source("timm", architecture, dict(getattr(model, "_model_args", {})))
    classes = getattr(model, "num_classes", None)
    if source.library == "timm" and isinstance(classes, int):  # reset_classifier changes it
        source = replace(source, model_args={**source.model_args, "num_classes": classes})
    return source


def _resolve(name: str) -> tuple[Source, dict[str, Any] | None]:
    """Turn a user's model name into a source, and the hub's configuration where it has one."""
    scheme, _, rest = name.partition(":")
    if scheme in ("hf-hub", "hf_hub", "local-dir", "local_dir"):
        load = load_model_config_from_path if scheme.startswith("local") else _hub_config
        try:
            cfg, architecture, args = load(rest)
            if not isinstance(architecture, str) or not isinstance(args or {}, dict):
                raise ValueError("its architecture is no name, or its model_args are no mapping")
            cfg = dict(cfg)
        except (ValueError, KeyError, OSError, TypeError, AttributeError, RuntimeError) as error:
            raise WeightsError(
                f"no model configuration at {name!r}: {first_line(error)}"
            ) from error
        classes = {"num_classes": cfg["num_classes"]} if "num_classes" in cfg else {}
        model_args = {**default_args("timm", architecture), **classes, **(args or {})}
        return Source("timm", architecture, model_args), cfg
    library, slash, short = name.rpartition("/")
    if slash and library not in ("timm", "torchvision"):
        raise ModelNameError(
            f"unknown model source {library!r} in {name!r}; allowed are NAME, timm/NAME, "
            "torchvision/NAME, hf-hub:USER/REPO, local-dir:FOLDER, or the path of a folder"
        )
    for candidate in ("timm", "torchvision"):
        known = _names(candidate)
        if library in ("", candidate) and short.partition(".")[0] in known:
            return Source(candidate, short, default_args(candidate, short)), None
    known = _names(library) if library else sorted({*_names("timm"), *_names("torchvision")})
    raise ModelNameError(_unknown(short, known))


def _names(library: str) -> list[str]:
    found: list[str] = timm.list_models() if library == "timm" else torchvision.models.list_models()
    return found


def _unknown(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    hint = f"; the nearest names are {', '.join(near)}" if near else ""
    return (
        f"unknown model {name!r}{hint}. Names are those of timm.list_models() and "
        "torchvision.models.list_models()"
    )


def default_args(library: Library, name: str) -> dict[str, Any]:
    """Arguments that an architecture needs to be rebuilt, or to be convertible at all."""
    if library == "timm" and name.startswith("convnext"):
        return {"conv_mlp": True}  # its Linears hold 95 % of the parameters; 1x1 convs are the same
    if library == "torchvision" and name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "transform_input": True, "init_weights": False}
    if library == "torchvision" and name.startswith(("fcn_", "deeplabv3_")):
        return {"aux_loss": True}  # as their pretrained weights have it
    return {}


def _hub_config(repo: str) -> Any:
    return load_model_config_from_hf(repo)


def _download(name: str, source: Source, cfg: dict[str, Any] | None) -> nn.Module:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    assert source.library is not None
    assert source.architecture is not None
    try:
        if source.library == "timm":
            origin = name if cfg is not None else source.architecture
            found = None
            if cfg is not None and cfg.get("source") == "local-dir":
                # Named as a file: older timm reads a folder's safetensors as pickle.
                origin, found = source.architecture, {**cfg, "source": "", "file": _weights_in(cfg)}
            return timm.create_model(  # type: ignore[no-any-return]
                origin, pretrained=True, pretrained_cfg=found, **source.model_args
            )
        if source.architecture.partition("_")[0] in FROZEN_NORMS:
            raise WeightsError(
                f"torchvision's pretrained {source.architecture} has frozen norms, which are not "
                "rebuilt from its name; create it with torchvision, convert it in Python, pass a "
                "fresh one to load()"
            )
        model = build(source)
        entry = torchvision.models.get_model_weights(source.architecture).DEFAULT
        with redirect_stdout(StringIO()):  # torch announces the download there, amid our JSON
            state = entry.get_state_dict(progress=False, check_hash=True)
        kept = {k: v for k, v in state.items() if k.partition(".")[0] not in AUXILIARY}
        load_state_(model, kept, f"torchvision's {entry}")
        return model
    except LegoError:
        raise
    except (TypeError, AttributeError, AssertionError, ArithmeticError) as error:
        raise UsageError(_unbuildable(source, error)) from error
    # Downloads and files of any kind: errors of the network, safetensors and pickle.
    except Exception as error:
        raise WeightsError(
            f"the pretrained weights of {name!r} cannot be had: {first_line(error)}. "
            "Give a local file with --weights FILE, or take random weights with --no-pretrained"
        ) from error


def _weights_in(cfg: dict[str, Any]) -> str:
    """The weights file of a local folder in timm's layout."""
    folder = Path(cfg["file"])
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (folder / file).is_file():
            return str(folder / file)
    raise FileNotFoundError("the folder has neither model.safetensors nor pytorch_model.bin")


def _torchvision(name: str, args: dict[str, Any]) -> nn.Module:
    if "in_chans" in args:
        raise UsageError(f"torchvision/{name} takes no in_chans; only timm's models do")
    builder = torchvision.models.get_model_builder(name)
    # Detectors and segmenters fetch an ImageNet backbone unless told not to.
    backbone = {"weights_backbone": None}
    extra = backbone if "weights_backbone" in inspect.signature(builder).parameters else {}
    model = builder(weights=None, **extra, **args)
    model.pretrained_cfg = _torchvision_cfg(name)
    return model  # type: ignore[no-any-return]


def _torchvision_cfg(name: str) -> dict[str, Any]:
    """A timm-like configuration from the transforms of a torchvision weights enum."""
    cfg: dict[str, Any] = {"architecture": name}
    # An enum's last entry need not be its default: RegNets have SWAG weights after it.
    entries: Any = torchvision.models.get_model_weights(name)
    transforms: Any = entries.DEFAULT.transforms() if len(entries) else None
    crop = getattr(transforms, "crop_size", None)
    if not crop:
        return cfg
    return {
        **cfg,
        "input_size": (3, crop[0], crop[0]),
        "crop_pct": crop[0] / transforms.resize_size[0],
        "crop_mode": "center",
        "interpolation": transforms.interpolation.value,
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
    }
