"""Save a converted network as a compressed folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import nn

from legocompress.checkpoint.codec import encode, list_unique_tensors
from legocompress.checkpoint.config import (
    CONFIG,
    FORMAT_VERSION,
    TENSORS,
    VERSION,
    CompressionConfig,
    LayerConfig,
    format_config,
    timm_config,
)
from legocompress.errors import CheckpointError, LegoError, OutputExistsError, UsageError
from legocompress.files import check_free, write_atomically, write_tensors
from legocompress.lego.module import LegoModule, lego_banks, lego_modules
from legocompress.models.checks import check_network
from legocompress.models.factory import build
from legocompress.models.source import source_of
from legocompress.quantize import active_quantization
from legocompress.state.conversion import ConversionRecord
from legocompress.state.model_state import lego_state
from legocompress.state.source import Source

LEGO_TENSORS = ("lego_filters", "index", "coefficients", "proxy")


def save(model: nn.Module, path: str | Path, force: bool = False) -> Path:
    """Write a converted or quantised network as a folder from which alone `load` rebuilds it.

    Filters and coefficients are stored in the dtypes of the conversion. Values that training has
    changed are rounded to these dtypes in the file.

    Args:
        model: the converted or quantised network.
        path: the folder to write.
        force: replace an existing folder.

    Raises:
        UsageError: the model is wrapped, compiled or scripted, or holds a lazy layer.
        CheckpointError: the model holds no Lego module and is not quantised, its architecture
            cannot be rebuilt from its source, or it has changed since it was quantised.
        OutputExistsError: the folder exists and `force` is not given, or it holds other files.
        OutputError: it cannot be written.
    """
    check_network(model)
    banks = {name: bank[0][0] for bank in lego_banks(model) for name, _ in bank[1:]}
    layers = {name: _layer_config(module, banks.get(name)) for name, module in lego_modules(model)}
    quantization = active_quantization(model)
    if not layers and quantization is None:
        raise CheckpointError(
            "the model holds no Lego module and is not quantised; convert it before saving"
        )
    source = _find_rebuildable_source(model, source_of(model))
    record = lego_state(model).conversion
    asked = record.spec.is_sharing if isinstance(record, ConversionRecord) else False
    is_sharing = bool(banks) or asked
    block = CompressionConfig(
        format_version=1 if quantization is None and not is_sharing else FORMAT_VERSION,
        legocompress_version=VERSION,
        library=source.library,
        reparameterized=source.reparameterized,
        weights=source.weights,
        spec=record.spec.model_dump(mode="json") if isinstance(record, ConversionRecord) else None,
        seed=record.seed if isinstance(record, ConversionRecord) else None,
        skipped=record.skipped if isinstance(record, ConversionRecord) else {},
        recipe=record.recipe if isinstance(record, ConversionRecord) else None,
        layers=layers,
        calibration=lego_state(model).calibration,
        quantization=quantization,
        deployment=lego_state(model).choices,
    )
    config = timm_config(model, source)
    config["compression_config"] = block.model_dump(mode="json")
    if quantization is None:
        del config["compression_config"]["quantization"]
    if not is_sharing:
        _leave_out_sharing_(config["compression_config"])
    text = format_config(config)
    target = Path(path)
    check_target(target, force)
    with write_atomically(target, force, folder=True) as folder:
        write_tensors(encode(model), folder / TENSORS)
        (folder / CONFIG).write_text(text)
    return target


def _leave_out_sharing_(block: dict[str, Any]) -> None:
    """Remove the keys about shared banks, which readers of format version 1 do not know."""
    for layer in block["layers"].values():
        del layer["bank"]
    for settings in [] if block["spec"] is None else [block["spec"], *block["spec"]["rules"]]:
        del settings["share"]


def check_target(target: Path, force: bool) -> None:
    """Raise OutputExistsError if a compressed folder may not be written at `target`."""
    check_free(target, force)
    if target.is_dir() and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise OutputExistsError(
            f"{str(target)!r} holds other files, so that even --force does not replace it; "
            "choose another --out"
        )


def _layer_config(module: LegoModule, bank: str | None) -> LayerConfig:
    shape = module.lego_shape
    return LayerConfig(
        n_lego=shape.n_lego,
        n_split=shape.n_split,
        n_terms=shape.n_terms,
        dtype=module.storage_dtype,
        coefficients_dtype=None if module.coefficients is None else module.coefficients_dtype,
        memory_dtype=str(module.lego_filters.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        weight_error=module.weight_error,
        bank=bank,
    )


def build_network(source: Source) -> nn.Module:
    """Build the architecture with random values, fused if the network was fused."""
    with torch.random.fork_rng(devices=[]):
        model = build(source)
    return reparameterize_model(model.eval(), inplace=True) if source.reparameterized else model


def build_skeleton(source: Source) -> nn.Module:
    """Build the architecture without memory for its tensors, if that is possible."""
    if source.reparameterized:  # fusing computes with values
        return build_network(source)
    try:
        with torch.device("meta"):
            return build(source)
    except UsageError:
        return build_network(source)


def _find_rebuildable_source(model: nn.Module, source: Source) -> Source:
    """Return the source that rebuilds this network, in training form or fused.

    Raises:
        CheckpointError: the source builds another network than the one to save.
    """
    if source.library is None:
        return source
    ours = _dense_shapes(model)
    try:
        for deployed in (source.reparameterized, not source.reparameterized):
            candidate = replace(source, reparameterized=deployed)
            fresh = {
                k: tuple(v.shape) for k, v in list_unique_tensors(build_skeleton(candidate)).items()
            }
            if fresh == ours:
                return candidate
    except LegoError as error:
        raise CheckpointError(f"the architecture cannot be rebuilt: {error}") from error
    raise CheckpointError(
        f"{source.library}/{source.architecture} with {source.model_args} is another network "
        f"(first difference at {min(set(fresh.items()) ^ set(ours.items()))[0]!r}); create it with "
        "legocompress.create(...), or set lego_state(model).source to Source(None, None) and pass "
        "the dense network to load()"
    )


def _dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    legos = dict(lego_modules(model))
    shapes = {}
    for name, tensor in list_unique_tensors(model).items():
        owner, _, leaf = name.rpartition(".")
        if owner not in legos or leaf not in LEGO_TENSORS:
            shapes[name] = tuple(tensor.shape)
    for name, module in legos.items():
        shapes[f"{name}.weight" if name else "weight"] = tuple(module.weight.shape)
    return shapes
