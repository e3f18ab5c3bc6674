"""The fused split-transform-merge: compiled kernels, their operator, and a plain fall-back."""

from legocompress.kernels.library import available, isa, why_unavailable
from legocompress.kernels.linear import linear
from legocompress.kernels.operator import ACTIVATIONS, FVCORE_HANDLES, lego_conv2d
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
