"""The package's own errors: what a command ends with, and how others are told."""

from __future__ import annotations

import pytest

from legocompress import errors
from legocompress.errors import LegoError, UsageError, first_line

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_usage_ends_with_two_and_failure_with_one(kind: type[LegoError]) -> None:
    assert issubclass(kind, LegoError)
    assert kind.exit_code == (2 if issubclass(kind, UsageError) else 1)
    assert kind.__doc__


def test_an_error_is_told_in_one_line() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(StopIteration()) == "StopIteration"
    assert first_line(OSError("a" * 1000)) == "a" * 300
