"""The fused split-transform-merge: compiled kernels, their operator, and a plain fall-back."""

from legocompress.kernels.library import available, isa, why_unavailable
from legocompress.kernels.operator import ACTIVATIONS, FVCORE_HANDLES, lego_conv2d
from legocompress.kernels.pack import TRANSFORMS, pack, supports

__all__ = [
    "ACTIVATIONS",
    "FVCORE_HANDLES",
    "TRANSFORMS",
    "available",
    "isa",
    "lego_conv2d",
    "pack",
    "supports",
    "why_unavailable",
]
