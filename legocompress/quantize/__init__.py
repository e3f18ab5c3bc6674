"""Networks in 8 bits: activation ranges, integer layers, and the emulation that defines them.

`quantize_` traces a network as `deploy_` does, measures on images what range each map has, and lets
each operator compute on uint8 maps by the arithmetic of `lego.integer`.
"""

from legocompress.quantize.quantization import (
    active_quantization,
    quantize_,
    requantize_,
    unquantize_,
)
from legocompress.state.quantization import Quantization

__all__ = ["Quantization", "active_quantization", "quantize_", "requantize_", "unquantize_"]
