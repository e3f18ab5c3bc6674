"""The compiled kernels of a deployed network's layers, as PyTorch operators, and a fallback."""

from legocompress.kernels.depthwise import count_depthwise_macs, depthwise_conv2d
from legocompress.kernels.library import available, isa, why_unavailable
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
    "Tape",
    "available",
    "depthwise_conv2d",
    "global_mean",
    "isa",
    "lego_conv2d",
    "linear",
    "max_pool2d",
    "pack",
    "recording",
    "release_arenas",
    "supports",
    "why_unavailable",
]

# For `FlopCountAnalysis.set_op_handle` of fvcore: how to count the MACs of each operator.
FVCORE_HANDLES = {
    "legocompress::lego_conv2d": count_lego_conv2d_macs,
    "legocompress::depthwise_conv2d": count_depthwise_macs,
}
