"""Errors of values that are changed in place say what to change; others pass unchanged."""

from __future__ import annotations

import pytest
import torch

from legocompress.errors import TrainingError
from legocompress.models.in_place import explain_in_place


def test_what_autograd_says_is_explained() -> None:
    leaf = torch.ones(2, requires_grad=True)
    words = r"cannot be trained.*y = y \+ x instead of y \+= x"
    with pytest.raises(TrainingError, match=words), explain_in_place():
        leaf.sigmoid().mul_(2).sum().backward()
    with pytest.raises(TrainingError, match=words), explain_in_place():
        leaf.add_(1)
    with pytest.raises(TrainingError, match=words), explain_in_place():
        (leaf * 2).unbind()[0].add_(1)
    with pytest.raises(TrainingError, match=r"was changed; or so$"), explain_in_place("; or so"):
        leaf.add_(1)


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match=r"^a bug$"), explain_in_place():
        raise RuntimeError("a bug")
