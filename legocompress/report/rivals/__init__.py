"""Rivals: the dense network in the forms that a user could run instead, in fp32, bf16 and int8."""

from legocompress.report.rivals.form import Form, Runner
from legocompress.report.rivals.table import (
    AGAINST,
    RIVALS,
    Against,
    build_rivals,
    check_packages,
)

__all__ = ["AGAINST", "RIVALS", "Against", "Form", "Runner", "build_rivals", "check_packages"]
