"""The integer sizes of one Lego unit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UnitShape:
    """The integer sizes that define one Lego unit; the properties derive everything else.

    A dense weight F has shape (n_out, channels, *kernel), where channels = c / groups.
    """

    n_out: int
    channels: int
    kernel: tuple[int, int]
    groups: int
    n_lego: int
    n_split: int
    n_terms: int

    @property
    def width(self) -> int:
        """Input channels of one fragment; the last fragment is padded with zeros up to it."""
        return -(-self.channels // self.n_split)

    @property
    def n_fragments(self) -> int:
        """Number of fragments: one per split and output channel."""
        return self.n_split * self.n_out

    @property
    def n_slots(self) -> int:
        """Number of entries of the index, and of the coefficients."""
        return self.n_fragments * self.n_terms

    @property
    def n_filter_values(self) -> int:
        """Number of values in the bank of Lego filters."""
        return self.n_lego * self.width * self.kernel[0] * self.kernel[1]

    @property
    def index_bits(self) -> int:
        """Bits per index entry: ceil(log2(n_lego)), which is 0 for a single Lego filter."""
        return (self.n_lego - 1).bit_length()
