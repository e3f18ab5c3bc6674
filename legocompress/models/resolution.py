"""Resolve a model name to the library, architecture and arguments that it means."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torchvision
from timm.models import load_model_config_from_hf
from timm.models._hub import load_model_config_from_path

from legocompress.errors import ModelNameError, WeightsError, first_line
from legocompress.state.source import Library, Source


def resolve(name: str) -> tuple[Source, dict[str, Any] | None]:
    """Turn a model name into a source, and into the configuration of the hub if it has one."""
    scheme, _, rest = name.partition(":")
    if scheme in ("hf-hub", "hf_hub", "local-dir", "local_dir"):
        load = load_model_config_from_path if scheme.startswith("local") else _hub_config
        try:
            cfg, architecture, args = load(rest)
            if not isinstance(architecture, str) or not isinstance(args or {}, dict):
                raise ValueError(
                    "its architecture is not a name, or its model_args are not a mapping"
                )
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
        names = list_names(candidate)
        if library in ("", candidate) and short.partition(".")[0] in names:
            return Source(candidate, short, default_args(candidate, short)), None
    names = (
        list_names(library)
        if library
        else sorted({*list_names("timm"), *list_names("torchvision")})
    )
    raise ModelNameError(explain_unknown_name(short, names))


def list_names(library: str) -> list[str]:
    """The architectures that a library knows."""
    names: list[str] = timm.list_models() if library == "timm" else torchvision.models.list_models()
    return names


def explain_unknown_name(name: str, names: list[str]) -> str:
    """The error text for a name that no library knows, with the nearest names."""
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    hint = f"; the nearest names are {', '.join(near)}" if near else ""
    return (
        f"unknown model {name!r}{hint}. Names are those of timm.list_models() and "
        "torchvision.models.list_models()"
    )


def default_args(library: Library, name: str) -> dict[str, Any]:
    """Arguments that an architecture needs so that it can be rebuilt and converted."""
    if library == "timm" and name.startswith("convnext"):
        return {"conv_mlp": True}  # 1x1 convs instead of Linears, which hold 95 % of the parameters
    if library == "torchvision" and name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "transform_input": True, "init_weights": False}
    if library == "torchvision" and name.startswith(("fcn_", "deeplabv3_")):
        return {"aux_loss": True}  # the pretrained weights have this head
    return {}


def _hub_config(repo: str) -> Any:
    return load_model_config_from_hf(repo)
