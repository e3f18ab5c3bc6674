"""Load a compressed folder: rebuild the network from the folder alone, and check every entry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from legocompress.checkpoint.codec import (
    count_packed_bytes,
    list_unique_tensors,
    scales_name,
    unpack_index,
)
from legocompress.checkpoint.config import (
    CONFIG,
    MAX_CONFIG_BYTES,
    TENSORS,
    CompressionConfig,
    LayerConfig,
    read_config,
)
from legocompress.checkpoint.hub import is_hub_name, local_folder
from legocompress.checkpoint.limits import check_arguments, limit_construction
from legocompress.checkpoint.write import build_network, build_skeleton
from legocompress.errors import CheckpointError, LegoError, SpecError, UsageError
from legocompress.lego.module import LegoModule, lego_modules
from legocompress.lego.shape import UnitShape
from legocompress.lego.storage import TORCH_DTYPES, dequantize_filters
from legocompress.lego.surgery import become_lego_, guard_fusing_, share_bank_
from legocompress.lego.unit import LegoUnit
from legocompress.models.checks import check_network
from legocompress.models.factory import create
from legocompress.models.probe import model_cfg
from legocompress.quantize import requantize_
from legocompress.spec import LegoSpec
from legocompress.state.conversion import ConversionRecord
from legocompress.state.model_state import lego_state
from legocompress.state.quantization import Quantization
from legocompress.state.source import Source

MEMORY_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
                 "float64": torch.float64}  # fmt: skip


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Rebuild a compressed network from its folder; the original is not needed.

    Args:
        path: the folder, or `hf-hub:USER/REPO` (`@REVISION` may follow) for one on the hub.
        model: a fresh dense instance, if the network is your own and no library builds it; it
            becomes the compressed network in place.

    Raises:
        UsageError: `model` is wrapped, compiled or scripted, or holds a lazy layer.
        CheckpointError: the folder is missing, damaged, contradictory, or of a newer format.
    """
    if model is not None:
        check_network(model)
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
    state = lego_state(model)
    state.source = source
    if block.spec is not None:
        state.conversion = ConversionRecord(
            _spec(folder, block.spec), block.seed or 0, dict(block.skipped), block.recipe
        )
    if block.calibration is not None:
        state.calibration = block.calibration
    state.choices = block.deployment
    _quantize_(model, block.quantization)
    if config.get("pretrained_cfg") is not None:
        network: Any = model
        network.pretrained_cfg = {**model_cfg(model), **_tuples(config["pretrained_cfg"])}
    return guard_fusing_(model).eval()


def _quantize_(model: nn.Module, record: Quantization | None) -> None:
    """Let a loaded network compute in the integers of its record."""
    lego_state(model).quantization = record
    if record is None:
        return
    for name, tensor in list_unique_tensors(model).items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise CheckpointError(f"quantisation: tensor {name!r} is {tensor.dtype}, not float32")
    requantize_(model)


def _spec(folder: Path, values: dict[str, Any]) -> LegoSpec:
    try:
        return LegoSpec(**values)
    except SpecError as error:
        raise CheckpointError(f"{str(folder / CONFIG)!r}: spec: {error}") from error


def _tuples(cfg: dict[str, Any]) -> dict[str, Any]:
    """Turn the lists of JSON into the tuples that timm uses."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items()}


def _rebuild(folder: Path, source: Source, block: CompressionConfig, file: Any) -> nn.Module:
    """Build the dense architecture, after a check that takes no memory for its tensors."""
    if source.library is None or not isinstance(source.architecture, str):
        raise CheckpointError(
            f"{str(folder)!r} holds a network that no library builds; build a fresh dense "
            "instance and pass it: load(path, model=...)"
        )
    if not isinstance(source.model_args, dict):
        raise CheckpointError(f"{str(folder / CONFIG)!r}: model_args is not a mapping")
    check_arguments(source.model_args)
    # A network in training form has several times the parts and values of the stored, fused one.
    parts = 1000 + 100 * len(file.keys())
    numbers = max(2**26, 1000 * (folder / TENSORS).stat().st_size)
    try:
        with limit_construction(parts, numbers):
            skeleton = build_skeleton(source)
        for name in block.layers:
            _find(skeleton, name)
        for name, tensor in list_unique_tensors(skeleton).items():
            owner, _, leaf = name.rpartition(".")
            if leaf != "weight" or owner not in block.layers:
                _check_shape(file, name, tuple(tensor.shape))
        return build_network(source)
    except CheckpointError:
        raise
    except LegoError as error:
        raise CheckpointError(f"{str(folder)!r} cannot be rebuilt: {error}") from error


def _become_(model: nn.Module, block: CompressionConfig, file: Any) -> None:
    """Turn layers of the dense model into Lego modules, and load the tensors of the file."""
    _check_banks(block)
    members = Counter(layer.bank for layer in block.layers.values() if layer.bank is not None)
    for name, layer in block.layers.items():
        if layer.bank is None:
            _become_layer_(model, name, layer, file, is_shared=name in members)
    owners = dict(lego_modules(model))
    for name, layer in block.layers.items():
        if layer.bank is not None:
            _become_layer_(model, name, layer, file, is_shared=True, owner=owners[layer.bank])
    tensors = list_unique_tensors(model)
    scales = {
        scales_name(_join_name(name, "lego_filters"))
        for name, layer in block.layers.items()
        if layer.dtype == "int8" and layer.bank is None
    }
    weights = _int8_weights(model, block, tensors)
    stored = set(file.keys()) - scales - {scales_name(name) for name in weights}
    if stored != tensors.keys():
        odd = sorted(stored ^ tensors.keys())[0]
        state = "unknown" if odd in stored else "missing"
        raise CheckpointError(f"tensor {odd!r} is {state} in the file")
    legos = dict(lego_modules(model))
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = legos.get(owner)
        if module is not None and leaf == "index":
            tensor.data = _read_index(file, name, module.lego_shape)
            continue
        stored_as = _read(file, name, tuple(tensor.shape))
        if name in weights:
            _check_int8(name, stored_as)
            unit_scales = _read_scales(file, scales_name(name), len(tensor))
            tensor.data = dequantize_filters(stored_as, unit_scales, torch.float32)
            continue
        if module is not None and leaf in ("lego_filters", "coefficients"):
            expected = module.storage_dtype if leaf == "lego_filters" else module.coefficients_dtype
            if stored_as.dtype != TORCH_DTYPES[expected]:
                raise CheckpointError(f"tensor {name!r} is {stored_as.dtype}, config: {expected}")
            memory = MEMORY_DTYPES[block.layers[owner].memory_dtype]
            if stored_as.dtype == torch.int8:
                _check_int8(name, stored_as)
                unit_scales = _read_scales(file, scales_name(name), module.lego_shape.n_lego)
                tensor.data = dequantize_filters(stored_as, unit_scales, memory)
            else:
                tensor.data = stored_as.to(memory)
        elif stored_as.dtype != tensor.dtype and not (
            tensor.is_floating_point() and stored_as.dtype in MEMORY_DTYPES.values()
        ):
            raise CheckpointError(f"tensor {name!r} is {stored_as.dtype}, expected {tensor.dtype}")
        elif block.quantization is not None and tensor.dtype == torch.float32:
            tensor.data = stored_as.float()  # values of norms are stored in fp16
        else:
            tensor.data = stored_as


def _int8_weights(
    model: nn.Module, block: CompressionConfig, tensors: dict[str, Tensor]
) -> set[str]:
    """The names of the weights of dense layers that are stored as int8.

    Raises:
        CheckpointError: the network has no conv or Linear of a name, or it is a Lego module.
    """
    layers = () if block.quantization is None else block.quantization.dense_layers
    for name in layers:
        _find(model, name)
    return {_join_name(name, "weight") for name in layers} & tensors.keys()


def _check_int8(name: str, values: Tensor) -> None:
    if values.dtype != torch.int8:
        raise CheckpointError(f"tensor {name!r} is {values.dtype}, expected int8")
    if bool((values == -128).any()):
        raise CheckpointError(f"tensor {name!r} holds -128, outside -127 to 127")


def _find(model: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    # Walk over modules: get_submodule reads attributes, which would assemble weights.
    module: nn.Module | None = model
    for part in name.split(".") if name else []:
        module = None if module is None else module._modules.get(part)
    if not isinstance(module, (nn.Conv2d, nn.Linear)) or isinstance(module, LegoModule):
        raise CheckpointError(f"the architecture has no conv or Linear called {name!r}")
    return module


def _join_name(owner: str, leaf: str) -> str:
    return f"{owner}.{leaf}" if owner else leaf


def _check_banks(block: CompressionConfig) -> None:
    """Check that every shared bank is stored by another layer of the same settings.

    A layer that stores a bank uses no other one, so there are no chains and no circles.
    """
    for name, layer in block.layers.items():
        if layer.bank is None:
            continue
        owner = block.layers.get(layer.bank)
        if block.format_version < 2:
            raise CheckpointError(
                f"layer {name!r} shares the bank {layer.bank!r}, which format version "
                f"{block.format_version} does not know"
            )
        if owner is None or owner.bank is not None:
            raise CheckpointError(
                f"layer {name!r} shares the bank {layer.bank!r}, which "
                + ("is no Lego layer" if owner is None else "stores no bank itself")
            )
        for field in ("n_lego", "dtype", "memory_dtype"):
            if getattr(layer, field) != getattr(owner, field):
                raise CheckpointError(
                    f"layer {name!r} shares the bank {layer.bank!r}, but has {field} "
                    f"{getattr(layer, field)!r} instead of {getattr(owner, field)!r}"
                )


def _become_layer_(
    model: nn.Module,
    name: str,
    layer: LayerConfig,
    file: Any,
    is_shared: bool,
    owner: LegoModule | None = None,
) -> None:
    """Turn a layer into a Lego module without values, on the bank of its `owner` if it has one."""
    module = _find(model, name)
    n_out, channels, *kernel = module.weight.shape
    kh, kw = kernel or (1, 1)
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    # A shared bank may hold more filters than one layer has fragments.
    has_too_many = layer.n_lego > layer.n_split * n_out and not is_shared
    if layer.n_split > channels or has_too_many:
        raise CheckpointError(
            f"layer {name!r}: n_split={layer.n_split} and n_lego={layer.n_lego} do not fit "
            f"a weight of shape {tuple(module.weight.shape)}"
        )
    if layer.n_terms > layer.n_lego:
        raise CheckpointError(f"layer {name!r}: n_terms={layer.n_terms} exceeds the Lego filters")
    shape = UnitShape(n_out, channels, (kh, kw), groups, layer.n_lego, layer.n_split, layer.n_terms)
    slots = (shape.n_split, n_out, shape.n_terms)
    # Checked before memory is taken for these sizes.
    bank = (shape.n_lego, shape.width, kh, kw)
    if owner is None:
        _check_shape(file, _join_name(name, "lego_filters"), bank)
    elif tuple(owner.lego_filters.shape) != bank:
        raise CheckpointError(
            f"layer {name!r} shares the bank {layer.bank!r} of shape "
            f"{tuple(owner.lego_filters.shape)}, but needs {bank}"
        )
    _check_shape(file, _join_name(name, "index"), (count_packed_bytes(shape),))
    empty: Callable[..., Tensor] = torch.empty
    lego = become_lego_(
        module,
        shape,
        LegoUnit(
            empty(bank) if owner is None else owner.lego_filters.detach(),
            torch.empty(slots, dtype=torch.int64),
            None if layer.coefficients_dtype is None else empty(slots),
        ),
        layer.dtype,
        layer.coefficients_dtype or "fp16",
    )
    lego.weight_error = layer.weight_error
    if owner is not None:
        share_bank_([owner, lego])


def _check_shape(file: Any, name: str, shape: tuple[int, ...]) -> None:
    if name not in file.keys():  # noqa: SIM118 (no mapping)
        raise CheckpointError(f"tensor {name!r} is missing in the file")
    stored = tuple(file.get_slice(name).get_shape())
    if stored != shape:
        raise CheckpointError(f"tensor {name!r} has shape {stored} in the file, expected {shape}")


def _read(file: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    _check_shape(file, name, shape)
    tensor: Tensor = file.get_tensor(name)
    # A copy is aligned in memory. With unaligned tensors, as in the file, convs round differently.
    return tensor.clone()


def _read_scales(file: Any, name: str, n_filters: int) -> Tensor:
    scales = _read(file, name, (n_filters,))
    if scales.dtype != torch.bfloat16 or not bool((scales.isfinite() & (scales > 0)).all()):
        raise CheckpointError(f"tensor {name!r} does not hold positive finite scales in bf16")
    return scales


def _read_index(file: Any, name: str, shape: UnitShape) -> Tensor:
    packed = _read(file, name, (count_packed_bytes(shape),))
    if packed.dtype != torch.uint8:
        raise CheckpointError(f"tensor {name!r} is {packed.dtype}, expected packed uint8")
    index = unpack_index(packed, shape.index_bits, shape.n_slots)
    if index.numel() and int(index.max()) >= shape.n_lego:
        raise CheckpointError(
            f"tensor {name!r} names Lego filter {int(index.max())}, but there are {shape.n_lego}"
        )
    return index.reshape(shape.n_split, shape.n_out, shape.n_terms)


def open_model(name: str, **create_args: Any) -> nn.Module:
    """Open a model by name: a compressed folder, a folder of timm, or a name that `create` takes.

    Args:
        name: path of a folder, name of such a folder on the hub, or name of a model.
        create_args: arguments of `create`; not allowed with a compressed folder.

    Raises:
        LegoError: as `load` and `create` raise.
    """
    try:
        folder = local_folder(name, (CONFIG,))
    except CheckpointError:  # `create` raises the better error
        return create(name, **create_args)
    if not (folder / CONFIG).is_file():
        return create(name, **create_args)
    settings = [
        k for k, v in create_args.items() if not (k == "seed" or v is None or v is True or v == {})
    ]
    if (folder / CONFIG).stat().st_size <= MAX_CONFIG_BYTES and "compression_config" not in (
        folder / CONFIG
    ).read_text(encoding="utf-8", errors="replace"):
        return create(name if is_hub_name(name) else f"local-dir:{name}", **create_args)
    if settings:
        raise UsageError(
            f"{name!r} is a compressed folder, which takes no {', '.join(settings)}: the folder "
            "says itself which network it holds"
        )
    return load(name)
