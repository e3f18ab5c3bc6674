"""Explain the error of a network that changes values in place which its gradient needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from legocompress.errors import TrainingError, first_line

# What PyTorch says of values changed in place: 'modified by an inplace operation', 'a leaf Variable
# that requires grad is being used in an in-place operation', '... is being modified inplace'.
IN_PLACE = re.compile(r"in-?place operation|being modified in-?place")


@contextmanager
def explain_in_place(advice: str = "") -> Iterator[None]:
    """Turn PyTorch's error of a value changed in place into one that says what to change.

    `advice` is appended to the text; all other errors pass unchanged.

    Raises:
        TrainingError: the network changes a value in place that its gradient needs.
    """
    try:
        yield
    except RuntimeError as error:
        if not IN_PLACE.search(str(error).lower()):
            raise
        raise TrainingError(
            "the network cannot be trained, since an in-place operation in its forward changes a "
            f"value that the gradient needs ({first_line(error)}); write y = y + x instead of "
            "y += x and nn.ReLU() instead of nn.ReLU(inplace=True). "
            "torch.autograd.set_detect_anomaly(True) shows the line whose value was changed"
            + advice
        ) from error
