"""The config.json of a compressed folder: the keys of timm's folders, and `compression_config`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from timm.models._hub import filter_pretrained_cfg
from torch import nn

from legocompress.checkpoint.limits import check_input_size
from legocompress.errors import CheckpointError
from legocompress.files import explain_missing
from legocompress.models.probe import model_cfg
from legocompress.spec import FilterDtype, StorageDtype
from legocompress.state.calibration import Calibration
from legocompress.state.deployment import Choices
from legocompress.state.quantization import Quantization
from legocompress.state.source import Source

FORMAT_VERSION = 2  # 1 has no quantisation and no shared banks; folders without are written as 1
VERSIONS = (1, 2)
VERSION = version("legocompress")
CONFIG, TENSORS = "config.json", "model.safetensors"
MAX_CONFIG_BYTES = 32 * 2**20


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LayerConfig(_Strict):
    """The settings of a Lego module that its tensors do not show.

    `bank` names the layer whose Lego filters this one uses; None if they are stored under its own
    name.
    """

    n_lego: int = Field(ge=1, le=2**31)
    n_split: int = Field(ge=1, le=2**31)
    n_terms: int = Field(ge=1, le=2**31)
    dtype: FilterDtype
    coefficients_dtype: StorageDtype | None
    memory_dtype: Literal["float32", "float16", "bfloat16", "float64"]
    weight_error: float | None = None
    bank: str | None = None


class CompressionConfig(_Strict):
    """The `compression_config` block of config.json."""

    format_version: int
    legocompress_version: str
    library: Literal["timm", "torchvision"] | None
    reparameterized: bool
    weights: str
    spec: dict[str, Any] | None = None
    seed: int | None = None
    skipped: dict[str, str] = {}
    recipe: dict[str, Any] | None = None
    layers: dict[str, LayerConfig]
    calibration: Calibration | None = None
    quantization: Quantization | None = None
    deployment: tuple[Choices, ...] = Field(default=(), max_length=16)


def timm_config(model: nn.Module, source: Source) -> dict[str, Any]:
    """The part of config.json that timm's hub folders have."""
    return {
        "architecture": source.architecture,
        "num_classes": getattr(model, "num_classes", None),
        "num_features": getattr(model, "num_features", None),
        "pretrained_cfg": _plain(
            filter_pretrained_cfg(model_cfg(model), remove_source=True, remove_null=True)
        ),
        "model_args": source.model_args,
    }


def _plain(cfg: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cfg.items() if not callable(value)}


def format_config(config: dict[str, Any]) -> str:
    """Write a configuration as JSON text; CheckpointError if a value has no JSON form."""
    try:
        return json.dumps(config, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the model's configuration is not plain JSON: {error}") from error


def read_config(folder: Path) -> tuple[dict[str, Any], CompressionConfig]:
    """Read and check config.json; return all of it, and its compression block.

    Raises:
        CheckpointError: it is missing or not valid.
    """
    path = folder / CONFIG
    for needed in (path, folder / TENSORS):
        if not needed.is_file():
            raise CheckpointError(
                f"{str(folder)!r} is not a compressed folder: it has no {needed.name}"
                f"{explain_missing(folder)}"
            )
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{str(path)!r} is larger than {MAX_CONFIG_BYTES:,} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("compression_config"), dict):
        raise CheckpointError(f"{str(path)!r} has no compression_config: not a compressed network")
    if not isinstance(config.get("pretrained_cfg", {}), (dict, type(None))):
        raise CheckpointError(f"{str(path)!r}: pretrained_cfg is not a mapping")
    check_input_size(config.get("pretrained_cfg") or {})
    written = config["compression_config"].get("format_version")
    if written not in VERSIONS:
        raise CheckpointError(
            f"{str(path)!r} has format version {written!r}; this legocompress "
            f"({VERSION}) reads {' and '.join(map(str, VERSIONS))}: install a version that reads it"
        )
    try:
        return config, CompressionConfig.model_validate_json(
            json.dumps(config["compression_config"])
        )
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise CheckpointError(f"{str(path)!r}: {where}: {fault['msg']}") from error
