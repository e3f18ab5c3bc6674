"""What the user asks for: LegoSpec, the rules per layer, and patterns of layer names."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from legocompress.errors import PatternError, SpecError

StorageDtype = Literal["fp32", "fp16", "bf16"]
FilterDtype = Literal["fp32", "fp16", "bf16", "int8"]
Share = Literal["layer", "stage", "network"]


class _Value(BaseModel):
    """A frozen value that refuses unknown keys and reports all faults together in a SpecError."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise SpecError(_describe_faults(error)) from None


def _describe_faults(error: ValidationError) -> str:
    """Describe all faults in one line, as 'key=value: what is wrong; ...'."""
    faults = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        faults.append(f"{where}={fault['input']!r}: {message[0].lower()}{message[1:]}")
    return "; ".join(faults)


class Rule(_Value):
    """Settings for the layers whose names match `pattern`; None keeps the general setting."""

    pattern: str = Field(min_length=1)
    m: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    o: int | None = Field(default=None, ge=1)
    k: int | None = Field(default=None, ge=1)
    coefficients: bool | None = None
    dtype: FilterDtype | None = None
    share: Share | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Parse 'PATTERN:key=value,...', such as 'layer4.*:m=0.25,o=4,k=4'.

        Raises:
            SpecError: the text has no settings, an unknown key, or a value out of range.
        """
        pattern, colon, settings = text.rpartition(":")
        pairs = [part.partition("=") for part in settings.split(",")]
        if not colon or not pattern or not all(equals for _, equals, _ in pairs):
            raise SpecError(
                f"rule {text!r} is not of the form PATTERN:key=value,... "
                "(keys m, o, k, coefficients, dtype, share), such as 'layer4.*:m=0.25,o=4,k=4'"
            )
        fields: dict[str, Any] = {key.strip(): value.strip() for key, _, value in pairs}
        if len(fields) < len(pairs) or "pattern" in fields:
            raise SpecError(
                f"rule {text!r} sets a key twice, or 'pattern', which comes before the colon"
            )
        return cls(pattern=pattern, **fields)


class LegoSpec(_Value):
    """The settings of a compression.

    Attributes:
        m: Lego filters per output channel.
        o: splits of the input channels.
        k: Lego filters summed per slot.
        coefficients: whether each term has a coefficient; without, it is the paper's binary form.
        dtype: storage dtype of the Lego filters. Conversion rounds to the storage dtypes, so that
            the network that is measured is the network that is saved.
        coefficients_dtype: storage dtype of the coefficients.
        share: which layers use one bank: none (`layer`), those that run at one resolution
            (`stage`), or all (`network`). Only fragments of one shape share a bank, so the layers
            are cut into fragments of the narrowest of them where their channels allow it. A shared
            bank has as many filters as the banks of its layers would have had together.
        rules: the first rule whose pattern matches a layer overrides its m, o, k, coefficients,
            dtype and share.
        only: patterns of the layers to convert; by default all that can be.
        skip: patterns of the layers not to convert.
        linear: convert Linear layers too.
        allow_expansion: also convert layers with more Lego filters than output channels (m' > n),
            or where the Lego form takes more bits than the dense weight.

    A layer that a rule or `only` names exactly, without a wildcard, is converted even if it is left
    out by default (stem, classifier, Linear).

    Raises:
        SpecError: a value is out of range or a key is unknown.
    """

    m: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    o: int = Field(default=2, ge=1)
    k: int = Field(default=1, ge=1)
    coefficients: bool = True
    dtype: FilterDtype = "fp32"
    coefficients_dtype: StorageDtype = "fp16"
    share: Share = "layer"
    rules: tuple[Rule, ...] = ()
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    linear: bool = False
    allow_expansion: bool = False

    @field_validator("rules", mode="before")
    @classmethod
    def _parse_rules(cls, rules: Any) -> Any:
        if not isinstance(rules, (list, tuple)):
            raise SpecError(f"rules={rules!r}: give a list of rules")
        return tuple(Rule.parse(rule) if isinstance(rule, str) else rule for rule in rules)

    @field_validator("only", "skip", mode="before")
    @classmethod
    def _wrap_single_pattern(cls, patterns: Any) -> Any:
        return (patterns,) if isinstance(patterns, str) else patterns

    def model_post_init(self, context: Any) -> None:
        """Refuse m > 1 unless expansion is allowed: such a bank has more filters than outputs."""
        rules = [(f"rule {r.pattern!r} m", r.m, r.share or self.share) for r in self.rules]
        for where, m, share in [("m", self.m, self.share), *rules]:
            is_expanding = m is not None and m > 1 and share == "layer"
            if is_expanding and not self.allow_expansion:
                raise SpecError(
                    f"{where}={m:g} would make more Lego filters than output channels, which is "
                    "slower and larger than dense; allowed is 0 < m <= 1, or pass allow_expansion "
                    "(--allow-expansion) if that is meant"
                )

    @property
    def is_sharing(self) -> bool:
        """Whether layers are asked to share banks: by the general setting, or by a rule."""
        return any(s not in (None, "layer") for s in (self.share, *(r.share for r in self.rules)))

    def for_layer(self, name: str) -> LegoSpec:
        """The settings of one layer: the general ones, changed by the first rule that matches."""
        for rule in self.rules:
            if matches(rule.pattern, name):
                changes = rule.model_dump(exclude={"pattern"}, exclude_none=True)
                return self.model_copy(update=changes)
        return self

    def names_exactly(self, name: str) -> bool:
        """Whether a rule or `only` names this layer without a wildcard."""
        return name in self.only or any(rule.pattern == name for rule in self.rules)

    def patterns(self) -> Iterable[tuple[str, str]]:
        """All patterns of this spec, as pairs (option, pattern)."""
        yield from (("rule", rule.pattern) for rule in self.rules)
        yield from (("only", pattern) for pattern in self.only)
        yield from (("skip", pattern) for pattern in self.skip)


def matches(pattern: str, name: str) -> bool:
    """Whether a layer name matches a pattern.

    A pattern is an exact name, a glob, or `re:` and a regular expression that must match fully.

    Raises:
        PatternError: the regular expression is malformed.
    """
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise PatternError(
                f"pattern {pattern!r} is not a regular expression: {error}"
            ) from None
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def check_patterns(spec: LegoSpec, names: Sequence[str]) -> None:
    """Raise PatternError if a pattern of the spec matches none of the model's layer names."""
    for option, pattern in spec.patterns():
        if not any(matches(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
            raise PatternError(
                f"--{option} pattern {pattern!r} matches none of the model's {len(names)} layers; "
                f"names look like {', '.join(map(repr, near))} "
                "(exact name, glob with *, or re: and a regular expression)"
            )
