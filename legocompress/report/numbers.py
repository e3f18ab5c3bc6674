"""Numbers as text: counts, sizes, ratios, errors and shapes."""

from __future__ import annotations

from collections.abc import Callable

COUNT_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
SIZE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def format_count(value: float | None) -> str:
    """Write a number with a metric letter: 25.56M; '?' for None."""
    if value is None:
        return "?"
    for limit, letter in COUNT_UNITS:
        if abs(value) >= limit:
            return f"{value / limit:.2f}{letter}"
    return f"{value:.0f}"


def format_size(bits: float | None) -> str:
    """Write bits as decimal bytes: 32.10 MB; '?' for None."""
    if bits is None:
        return "?"
    value = bits / 8
    for limit, unit in SIZE_UNITS:
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f} B"


def format_ratio(before: float | None, after: float | None) -> str:
    """Write before / after as a factor: 3.19x; '?' where one is None or zero."""
    return f"{before / after:.2f}x" if before and after else "?"


def format_short_count(value: float | None) -> str:
    """Write a number with a metric letter and three digits, for tables: 25.6M."""
    return _format_three_digits(value, COUNT_UNITS, "")


def format_short_size(bits: float | None) -> str:
    """Write bits as decimal bytes with three digits, for tables: 32.1MB."""
    return _format_three_digits(None if bits is None else bits / 8, SIZE_UNITS, "B")


def _format_three_digits(
    value: float | None, units: tuple[tuple[float, str], ...], smallest_unit: str
) -> str:
    if value is None:
        return "?"
    # Limits are a little lower than the unit: 999.6 rounds to 1000, which is 1.00k.
    for limit, unit in units:
        if abs(value) >= 0.9995 * limit:
            scaled = value / limit
            decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{decimals}f}{unit}"
    return f"{value:.0f}{smallest_unit}"


def format_change(
    format_value: Callable[[float | None], str], before: float | None, after: float | None
) -> str:
    """Write 'before→after', one value if they are equal, '' if one is None."""
    if before is None or after is None:
        return ""
    if before == after:
        return format_value(before)
    return f"{format_value(before)}→{format_value(after)}"


def format_error(value: float | None) -> str:
    """Write a relative error with three decimals; '' for None."""
    return "" if value is None else f"{value:.3f}"


def format_shape(shape: tuple[int, ...], groups: int = 1) -> str:
    """Write a tensor's shape, with the groups of a grouped conv: 64x8x3x3 g4."""
    return "x".join(map(str, shape)) + (f" g{groups}" if groups > 1 else "")
