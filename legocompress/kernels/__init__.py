"""The fused split-transform-merge: compiled kernels, their operator, and a plain fall-back."""

from legocompress.kernels.depthwise import depthwise_conv2d, depthwise_macs
from legocompress.kernels.library import available, isa, why_unavailable
from legocompress.kernels.linear import linear
from legocompress.kernels.operator import ACTIVATIONS, lego_conv2d, lego_conv2d_macs
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

FVCORE_HANDLES = {
    "legocompress::lego_conv2d": lego_conv2d_macs,
    "legocompress::depthwise_conv2d": depthwise_macs,
}
