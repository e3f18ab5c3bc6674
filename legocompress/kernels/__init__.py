"""The compiled kernels of a deployed network's layers, as PyTorch operators, and a fallback."""

from legocompress.kernels.depthwise import count_depthwise_macs, depthwise_conv2d
from legocompress.kernels.int8_layers import (
    add_maps_int8,
    apply_linear_int8,
    average_maps_int8,
    concatenate_int8,
    convolve_int8,
    dequantize_int8,
    look_up_int8,
    max_pool_int8,
    quantize_int8,
    scale_maps_int8,
)
from legocompress.kernels.int8_map import (
    IntegerMap,
    empty_map,
    lay_out_map,
    read_map,
    use_int8_isa,
)
from legocompress.kernels.int8_pack import (
    PackedIntegerConv,
    PackedIntegerLinear,
    pack_integer_conv,
    pack_integer_linear,
)
from legocompress.kernels.library import available, int8_isa, int8_isas, isa, why_unavailable
from legocompress.kernels.linear import linear
from legocompress.kernels.operator import ACTIVATIONS, count_lego_conv2d_macs, lego_conv2d
from legocompress.kernels.pack import TRANSFORMS, pack, supports
from legocompress.kernels.pool import MAX_POOL_KERNEL, global_mean, max_pool2d
from legocompress.kernels.tape import Tape, recording, release_arenas

__all__ = [
    "ACTIVATIONS",
    "FVCORE_HANDLES",
    "MAX_POOL_KERNEL",
    "TRANSFORMS",
    "IntegerMap",
    "PackedIntegerConv",
    "PackedIntegerLinear",
    "Tape",
    "add_maps_int8",
    "apply_linear_int8",
    "available",
    "average_maps_int8",
    "concatenate_int8",
    "convolve_int8",
    "depthwise_conv2d",
    "dequantize_int8",
    "empty_map",
    "global_mean",
    "int8_isa",
    "int8_isas",
    "isa",
    "lay_out_map",
    "lego_conv2d",
    "linear",
    "look_up_int8",
    "max_pool2d",
    "max_pool_int8",
    "pack",
    "pack_integer_conv",
    "pack_integer_linear",
    "quantize_int8",
    "read_map",
    "recording",
    "release_arenas",
    "scale_maps_int8",
    "supports",
    "use_int8_isa",
    "why_unavailable",
]

# For `FlopCountAnalysis.set_op_handle` of fvcore: how to count the MACs of each operator.
FVCORE_HANDLES = {
    "legocompress::lego_conv2d": count_lego_conv2d_macs,
    "legocompress::depthwise_conv2d": count_depthwise_macs,
}
