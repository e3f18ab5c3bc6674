"""Encode the state of a converted network as tensors of a file: indices packed, values rounded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from legocompress.errors import CheckpointError
from legocompress.lego.module import lego_modules
from legocompress.lego.shape import UnitShape
from legocompress.lego.storage import TORCH_DTYPES, quantize_filters, round_to_storage
from legocompress.quantize import active_quantization
from legocompress.spec import FilterDtype


def pack_index(index: Tensor, bits: int) -> Tensor:
    """Pack integers in [0, 2**bits) into bytes (B,), `bits` each, least significant first."""
    if bits == 0:
        return torch.zeros(0, dtype=torch.uint8)
    places = torch.arange(bits)
    stream = ((index.reshape(-1, 1) >> places) & 1).to(torch.uint8).flatten()
    padded = nn.functional.pad(stream, (0, -len(stream) % 8)).reshape(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_index(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_index`: return the first `count` integers, (count,) int64."""
    if bits == 0:
        return torch.zeros(count, dtype=torch.int64)
    stream = ((packed.reshape(-1, 1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()
    digits = stream[: count * bits].reshape(count, bits).to(torch.int64)
    return (digits << torch.arange(bits)).sum(1)


def count_packed_bytes(shape: UnitShape) -> int:
    """Bytes of the packed index of a layer."""
    return -(-shape.n_slots * shape.index_bits // 8)


def encode(model: nn.Module) -> dict[str, Tensor]:
    """Turn the state of a converted network into the tensors of a file, each stored once.

    Raises:
        CheckpointError: the state holds something that is not a tensor, or a quantised layer has
            changed.
    """
    record = active_quantization(model)
    int8_layers = () if record is None else record.dense_layers
    stored: dict[str, Tensor] = {}
    legos = dict(lego_modules(model))
    for lego in legos.values():
        lego.synchronise_index()
    for name, tensor in list_unique_tensors(model).items():
        owner, _, leaf = name.rpartition(".")
        module = legos.get(owner)
        if module is not None and leaf == "proxy":
            continue  # the index holds what it chose
        if module is None and leaf == "weight" and owner in int8_layers:
            stored.update(_encode_weight(name, tensor.detach()))
        elif module is None:
            stored[name] = tensor.detach() if record is None else _narrow(tensor.detach())
        elif leaf == "index":
            stored[name] = pack_index(tensor.cpu(), module.lego_shape.index_bits)
        elif leaf == "lego_filters":
            stored.update(encode_filters(name, tensor.detach(), module.storage_dtype))
        elif leaf == "coefficients":
            dtype = module.coefficients_dtype
            stored[name] = round_to_storage(tensor.detach(), dtype).to(TORCH_DTYPES[dtype])
        else:
            stored[name] = tensor.detach()
    # Copies, since safetensors refuses tensors that share memory.
    return {name: tensor.cpu().clone().contiguous() for name, tensor in stored.items()}


def encode_filters(name: str, filters: Tensor, dtype: FilterDtype) -> dict[str, Tensor]:
    """Encode a bank (m, q, kh, kw) as tensors of a file; int8 adds the scales (m,)."""
    rounded = round_to_storage(filters, dtype)
    if dtype != "int8":
        return {name: rounded.to(TORCH_DTYPES[dtype])}
    values, scales = quantize_filters(rounded)
    return {name: values, scales_name(name): scales}


def _narrow(tensor: Tensor) -> Tensor:
    """A float32 tensor as fp16 if this changes no value, as quantisation makes those of norms."""
    if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
        return tensor
    narrow = tensor.half()
    return narrow if torch.equal(narrow.float(), tensor) else tensor


def _encode_weight(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Encode the weight (n, ...) of a quantised dense layer: int8 values and scales (n,)."""
    if not torch.equal(round_to_storage(weight, "int8"), weight):
        raise CheckpointError(
            f"{name!r} has changed since quantize_, so the network is not what was quantised; "
            "call unquantize_ and then quantize_ before saving"
        )
    values, scales = quantize_filters(weight)
    return {name: values, scales_name(name): scales}


def scales_name(name: str) -> str:
    """The name of the scales: NAME.lego_scales of Lego filters, NAME.weight_scales of a weight."""
    if name.rpartition(".")[2] == "lego_filters":
        return f"{name.removesuffix('lego_filters')}lego_scales"
    return f"{name}_scales"


def list_unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors of a state dict, each under its first name only."""
    tensors: dict[str, Tensor] = {}
    ids: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"the state {name!r} is a {type(tensor).__name__}, not a tensor")
        if id(tensor) not in ids:
            tensors[name] = tensor
            ids.add(id(tensor))
    return tensors
