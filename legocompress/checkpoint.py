"""The compressed folder: config.json and model.safetensors, saved and loaded as exact inverses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from timm.models._hub import filter_pretrained_cfg
from timm.utils import reparameterize_model
from torch import Tensor, nn

from legocompress.bounds import building_at_most, check_arguments, check_input_size
from legocompress.calibrate.record import Calibration
from legocompress.codec import encode, own_tensors, packed_bytes, scales_name, unpack_index
from legocompress.conv import LegoModule, become_lego_, guard_fusing_, lego_modules
from legocompress.convert import TORCH_DTYPES, Record, dequantized
from legocompress.deploy.choices import Choices
from legocompress.errors import CheckpointError, LegoError, OutputExistsError, SpecError, UsageError
from legocompress.files import check_free, write_tensors, writing
from legocompress.hub import is_hub_name, local_folder
from legocompress.models import Source, build, create, source_of
from legocompress.probe import model_cfg
from legocompress.spec import FilterDtype, LegoSpec, StorageDtype, UnitShape

FORMAT_VERSION = 1
VERSION = version("legocompress")
CONFIG, TENSORS = "config.json", "model.safetensors"
LEGO_TENSORS = ("lego_filters", "index", "coefficients", "proxy")
MAX_CONFIG_BYTES = 32 * 2**20
MEMORY_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
                 "float64": torch.float64}  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LayerConfig(_Strict):
    """What a Lego module needs beside its tensors."""

    n_lego: int = Field(ge=1, le=2**31)
    n_split: int = Field(ge=1, le=2**31)
    n_terms: int = Field(ge=1, le=2**31)
    dtype: FilterDtype
    coefficients_dtype: StorageDtype | None
    memory_dtype: Literal["float32", "float16", "bfloat16", "float64"]
    weight_error: float | None = None


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
    deployment: tuple[Choices, ...] = Field(default=(), max_length=16)


def save(model: nn.Module, path: str | Path, force: bool = False) -> Path:
    """Write a converted network as a folder that `load` rebuilds from itself alone.

    Filters and coefficients are stored in the dtypes that the conversion was asked for; values that
    training has moved off them are rounded in the file.

    Args:
        model: the converted network.
        path: the folder to write.
        force: replace what stands there.

    Raises:
        CheckpointError: the model holds no Lego module, or its architecture cannot be rebuilt from
            what is known about it.
        OutputExistsError: the folder exists and `force` is not given, or holds something else.
        OutputError: it cannot be written.
    """
    layers = {name: _layer_config(module) for name, module in lego_modules(model)}
    if not layers:
        raise CheckpointError("the model holds no Lego module; convert it before saving")
    source = _rebuildable(model, source_of(model))
    record = getattr(model, "lego_record", None)
    block = CompressionConfig(
        format_version=FORMAT_VERSION,
        legocompress_version=VERSION,
        library=source.library,
        reparameterized=source.reparameterized,
        weights=source.weights,
        spec=record.spec.model_dump(mode="json") if isinstance(record, Record) else None,
        seed=record.seed if isinstance(record, Record) else None,
        skipped=record.skipped if isinstance(record, Record) else {},
        recipe=record.recipe if isinstance(record, Record) else None,
        layers=layers,
        calibration=getattr(model, "lego_calibration", None),
        deployment=getattr(model, "lego_choices", ()),
    )
    config = timm_config(model, source)
    config["compression_config"] = block.model_dump(mode="json")
    text = config_text(config)
    target = Path(path)
    check_target(target, force)
    with writing(target, force, folder=True) as folder:
        write_tensors(encode(model), folder / TENSORS)
        (folder / CONFIG).write_text(text)
    return target


def timm_config(model: nn.Module, source: Source) -> dict[str, Any]:
    """What timm's hub folders say about a network in their config.json."""
    return {
        "architecture": source.architecture,
        "num_classes": getattr(model, "num_classes", None),
        "num_features": getattr(model, "num_features", None),
        "pretrained_cfg": _plain(
            filter_pretrained_cfg(model_cfg(model), remove_source=True, remove_null=True)
        ),
        "model_args": source.model_args,
    }


def config_text(config: dict[str, Any]) -> str:
    """A configuration as the text of a config.json; CheckpointError if it is not plain JSON."""
    try:
        return json.dumps(config, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the model's configuration is not plain JSON: {error}") from error


def check_target(target: Path, force: bool) -> None:
    """Raise OutputExistsError if a compressed folder may not be written at `target`."""
    check_free(target, force)
    if target.is_dir() and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise OutputExistsError(
            f"{str(target)!r} is a folder of something else, which even --force does not replace; "
            "choose another --out"
        )


def _plain(cfg: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cfg.items() if not callable(value)}


def _layer_config(module: LegoModule) -> LayerConfig:
    shape = module.lego_shape
    return LayerConfig(
        n_lego=shape.n_lego,
        n_split=shape.n_split,
        n_terms=shape.n_terms,
        dtype=module.storage_dtype,
        coefficients_dtype=None if module.coefficients is None else module.coefficients_dtype,
        memory_dtype=str(module.lego_filters.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        weight_error=module.weight_error,
    )


def _fresh(source: Source) -> nn.Module:
    """The architecture with random values, in deployed form if it was converted so."""
    with torch.random.fork_rng(devices=[]):
        model = build(source)
    return reparameterize_model(model.eval(), inplace=True) if source.reparameterized else model


def skeleton_of(source: Source) -> nn.Module:
    """The architecture without memory for its tensors, where it can be built so."""
    if source.reparameterized:  # fusing computes with the values
        return _fresh(source)
    try:
        with torch.device("meta"):
            return build(source)
    except UsageError:
        return _fresh(source)


def _rebuildable(model: nn.Module, source: Source) -> Source:
    """The source that rebuilds this network, in training or deployed form.

    Raises:
        CheckpointError: what the source builds is not the network that is being saved.
    """
    if source.library is None:
        return source
    ours = _dense_shapes(model)
    try:
        for deployed in (source.reparameterized, not source.reparameterized):
            candidate = replace(source, reparameterized=deployed)
            fresh = {k: tuple(v.shape) for k, v in own_tensors(skeleton_of(candidate)).items()}
            if fresh == ours:
                return candidate
    except LegoError as error:
        raise CheckpointError(f"the architecture cannot be rebuilt: {error}") from error
    raise CheckpointError(
        f"{source.library}/{source.architecture} with {source.model_args} is another network "
        f"(first difference at {min(set(fresh.items()) ^ set(ours.items()))[0]!r}); create it with "
        "legocompress.create(...), or set model.lego_source to Source(None, None) and pass the "
        "dense network to load()"
    )


def _dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    legos = dict(lego_modules(model))
    shapes = {}
    for name, tensor in own_tensors(model).items():
        owner, _, leaf = name.rpartition(".")
        if owner not in legos or leaf not in LEGO_TENSORS:
            shapes[name] = tuple(tensor.shape)
    for name, module in legos.items():
        shapes[f"{name}.weight" if name else "weight"] = tuple(module.weight.shape)
    return shapes


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Rebuild a compressed network from its folder; the original is not needed.

    Args:
        path: the folder, or `hf-hub:USER/REPO` (`@REVISION` may follow) for one on the hub.
        model: for a network of your own that no library builds: a fresh dense instance, which
            becomes the compressed one in place.

    Raises:
        CheckpointError: the folder is missing, damaged, of a newer format, or not true to itself.
    """
    folder = local_folder(path)
    config, block = read_config(folder)
    source = Source(
        block.library,
        config.get("architecture"),
        {} if config.get("model_args") is None else config["model_args"],
        block.weights,
        block.reparameterized,
    )
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            if model is None:
                model = _rebuild(folder, source, block, file)
            _become_(model, block, file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(folder / TENSORS)!r} is damaged: {error}") from error
    noted: Any = model
    noted.lego_source = source
    if block.spec is not None:
        noted.lego_record = Record(
            _spec(folder, block.spec), block.seed or 0, dict(block.skipped), block.recipe
        )
    if block.calibration is not None:
        noted.lego_calibration = block.calibration
    noted.lego_choices = block.deployment
    if config.get("pretrained_cfg") is not None:
        noted.pretrained_cfg = {**model_cfg(model), **_tuples(config["pretrained_cfg"])}
    return guard_fusing_(model).eval()


def read_config(folder: Path) -> tuple[dict[str, Any], CompressionConfig]:
    """Read and check config.json of a compressed folder: all of it, and its compression block.

    Raises:
        CheckpointError: it is missing or says something that it may not.
    """
    path = folder / CONFIG
    for needed in (path, folder / TENSORS):
        if not needed.is_file():
            raise CheckpointError(
                f"{str(folder)!r} is no compressed folder: it has no {needed.name}"
            )
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{str(path)!r} is larger than {MAX_CONFIG_BYTES:,} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("compression_config"), dict):
        raise CheckpointError(f"{str(path)!r} has no compression_config: not a compressed network")
    if not isinstance(config.get("pretrained_cfg", {}), (dict, type(None))):
        raise CheckpointError(f"{str(path)!r}: pretrained_cfg is no mapping")
    check_input_size(config.get("pretrained_cfg") or {})
    written = config["compression_config"].get("format_version")
    if written != FORMAT_VERSION:
        raise CheckpointError(
            f"{str(path)!r} has format version {written!r}; this legocompress "
            f"({VERSION}) reads {FORMAT_VERSION}: install a version that reads it"
        )
    try:
        return config, CompressionConfig.model_validate_json(
            json.dumps(config["compression_config"])
        )
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise CheckpointError(f"{str(path)!r}: {where}: {fault['msg']}") from error


def _spec(folder: Path, values: dict[str, Any]) -> LegoSpec:
    try:
        return LegoSpec(**values)
    except SpecError as error:
        raise CheckpointError(f"{str(folder / CONFIG)!r}: spec: {error}") from error


def _tuples(cfg: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that timm keeps."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items()}


def _rebuild(folder: Path, source: Source, block: CompressionConfig, file: Any) -> nn.Module:
    """Build the dense architecture, checked without memory first."""
    if source.library is None or not isinstance(source.architecture, str):
        raise CheckpointError(
            f"{str(folder)!r} holds a network of somebody's own class; build a fresh dense "
            "instance and pass it: load(path, model=...)"
        )
    if not isinstance(source.model_args, dict):
        raise CheckpointError(f"{str(folder / CONFIG)!r}: model_args is no mapping")
    check_arguments(source.model_args)
    # A training form has several times the parts and numbers of the deployed one that is stored.
    parts = 1000 + 100 * len(file.keys())
    numbers = max(2**26, 1000 * (folder / TENSORS).stat().st_size)
    try:
        with building_at_most(parts, numbers):
            skeleton = skeleton_of(source)
        for name in block.layers:
            _find(skeleton, name)
        for name, tensor in own_tensors(skeleton).items():
            owner, _, leaf = name.rpartition(".")
            if leaf != "weight" or owner not in block.layers:
                _check_shape(file, name, tuple(tensor.shape))
        return _fresh(source)
    except CheckpointError:
        raise
    except LegoError as error:
        raise CheckpointError(f"{str(folder)!r} cannot be rebuilt: {error}") from error


def _become_(model: nn.Module, block: CompressionConfig, file: Any) -> None:
    """Give the dense model the config's Lego modules and the file's tensors, all checked."""
    for name, layer in block.layers.items():
        _become_layer_(model, name, layer, file)
    own = own_tensors(model)
    scales = {
        scales_name(_within(name, "lego_filters"))
        for name, layer in block.layers.items()
        if layer.dtype == "int8"
    }
    stored = set(file.keys()) - scales
    if stored != own.keys():
        odd = sorted(stored ^ own.keys())[0]
        state = "unknown" if odd in stored else "missing"
        raise CheckpointError(f"tensor {odd!r} is {state} in the file")
    legos = dict(lego_modules(model))
    for name, tensor in own.items():
        owner, _, leaf = name.rpartition(".")
        module = legos.get(owner)
        if module is not None and leaf == "index":
            tensor.data = _read_index(file, name, module.lego_shape)
            continue
        stored_as = _read(file, name, tuple(tensor.shape))
        if module is not None and leaf in ("lego_filters", "coefficients"):
            expected = module.storage_dtype if leaf == "lego_filters" else module.coefficients_dtype
            if stored_as.dtype != TORCH_DTYPES[expected]:
                raise CheckpointError(f"tensor {name!r} is {stored_as.dtype}, config: {expected}")
            memory = MEMORY_DTYPES[block.layers[owner].memory_dtype]
            if stored_as.dtype == torch.int8:
                if bool((stored_as == -128).any()):
                    raise CheckpointError(f"tensor {name!r} holds -128, outside -127 to 127")
                unit_scales = _read_scales(file, scales_name(name), module.lego_shape)
                tensor.data = dequantized(stored_as, unit_scales, memory)
            else:
                tensor.data = stored_as.to(memory)
        elif stored_as.dtype != tensor.dtype and not (
            tensor.is_floating_point() and stored_as.dtype in MEMORY_DTYPES.values()
        ):
            raise CheckpointError(f"tensor {name!r} is {stored_as.dtype}, expected {tensor.dtype}")
        else:
            tensor.data = stored_as


def _find(model: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    # Step by step, since get_submodule reads attributes, and so assembles weights.
    module: nn.Module | None = model
    for part in name.split(".") if name else []:
        module = None if module is None else module._modules.get(part)
    if not isinstance(module, (nn.Conv2d, nn.Linear)) or isinstance(module, LegoModule):
        raise CheckpointError(f"the architecture has no conv or Linear called {name!r}")
    return module


def _within(owner: str, leaf: str) -> str:
    return f"{owner}.{leaf}" if owner else leaf


def _become_layer_(model: nn.Module, name: str, layer: LayerConfig, file: Any) -> None:
    module = _find(model, name)
    n_out, channels, *kernel = module.weight.shape
    kh, kw = kernel or (1, 1)
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    if layer.n_split > channels or layer.n_lego > layer.n_split * n_out:
        raise CheckpointError(
            f"layer {name!r}: n_split={layer.n_split} and n_lego={layer.n_lego} do not fit "
            f"a weight of shape {tuple(module.weight.shape)}"
        )
    if layer.n_terms > layer.n_lego:
        raise CheckpointError(f"layer {name!r}: n_terms={layer.n_terms} exceeds the Lego filters")
    shape = UnitShape(n_out, channels, (kh, kw), groups, layer.n_lego, layer.n_split, layer.n_terms)
    slots = (shape.n_split, n_out, shape.n_terms)
    # Before memory is taken for them.
    bank = (shape.n_lego, shape.width, kh, kw)
    _check_shape(file, _within(name, "lego_filters"), bank)
    _check_shape(file, _within(name, "index"), (packed_bytes(shape),))
    empty: Callable[..., Tensor] = torch.empty
    become_lego_(
        module,
        shape,
        empty(bank),
        torch.empty(slots, dtype=torch.int64),
        None if layer.coefficients_dtype is None else empty(slots),
        layer.dtype,
        layer.coefficients_dtype or "fp16",
    ).weight_error = layer.weight_error


def _check_shape(file: Any, name: str, shape: tuple[int, ...]) -> None:
    if name not in file.keys():  # noqa: SIM118 (no mapping)
        raise CheckpointError(f"tensor {name!r} is missing in the file")
    found = tuple(file.get_slice(name).get_shape())
    if found != shape:
        raise CheckpointError(f"tensor {name!r} has shape {found} in the file, expected {shape}")


def _read(file: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    _check_shape(file, name, shape)
    tensor: Tensor = file.get_tensor(name)
    # A copy is aligned in memory; unaligned, as in the file, convs round differently.
    return tensor.clone()


def _read_scales(file: Any, name: str, shape: UnitShape) -> Tensor:
    scales = _read(file, name, (shape.n_lego,))
    if scales.dtype != torch.bfloat16 or not bool((scales.isfinite() & (scales > 0)).all()):
        raise CheckpointError(f"tensor {name!r} does not hold positive finite scales in bf16")
    return scales


def _read_index(file: Any, name: str, shape: UnitShape) -> Tensor:
    packed = _read(file, name, (packed_bytes(shape),))
    if packed.dtype != torch.uint8:
        raise CheckpointError(f"tensor {name!r} is {packed.dtype}, expected packed uint8")
    index = unpack_index(packed, shape.index_bits, shape.n_slots)
    if index.numel() and int(index.max()) >= shape.n_lego:
        raise CheckpointError(
            f"tensor {name!r} names Lego filter {int(index.max())}, but there are {shape.n_lego}"
        )
    return index.reshape(shape.n_split, shape.n_out, shape.n_terms)


def open_model(name: str, **create_args: Any) -> nn.Module:
    """Open a model by name: a compressed folder, a hub folder of timm's, or what `create` takes.

    Args:
        name: a folder's path, a hub name of such a folder, or a model name.
        create_args: passed on to `create`; a compressed folder takes none of them.

    Raises:
        LegoError: as `load` and `create` raise.
    """
    try:
        folder = local_folder(name, (CONFIG,))
    except CheckpointError:  # as `create` explains
        return create(name, **create_args)
    if not (folder / CONFIG).is_file():
        return create(name, **create_args)
    given = [
        k for k, v in create_args.items() if not (k == "seed" or v is None or v is True or v == {})
    ]
    if (folder / CONFIG).stat().st_size <= MAX_CONFIG_BYTES and "compression_config" not in (
        folder / CONFIG
    ).read_text(encoding="utf-8", errors="replace"):
        return create(name if is_hub_name(name) else f"local-dir:{name}", **create_args)
    if given:
        raise UsageError(
            f"{name!r} is a compressed folder, which takes no {', '.join(given)}: it says itself "
            "what network it holds"
        )
    return load(name)
