"""Settings: which are refused with which message, how rules are parsed, what patterns match."""

from __future__ import annotations

import math
from typing import Any

import pytest

from legocompress.errors import PatternError, SpecError, UsageError
from legocompress.lego.shape import UnitShape
from legocompress.spec import LegoSpec, Rule, check_patterns, matches

NAMES = ["stem.conv", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "fc"]


def assert_message_has(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"m": 0}, ["m=0", "greater than 0"]),
        ({"m": -0.5}, ["m=-0.5", "greater than 0"]),
        ({"m": math.nan}, ["m=nan"]),
        ({"m": math.inf}, ["m=inf", "finite"]),
        ({"m": "many"}, ["m='many'", "number"]),
        ({"m": None}, ["m=None"]),
        ({"m": 1.5}, ["m=1.5", "more Lego filters than output channels", "allow_expansion"]),
        ({"o": 0}, ["o=0", "greater than or equal to 1"]),
        ({"o": -2}, ["o=-2"]),
        ({"o": 2.5}, ["o=2.5", "integer"]),
        ({"k": 0}, ["k=0", "greater than or equal to 1"]),
        ({"k": "x"}, ["k='x'", "integer"]),
        ({"dtype": "int4"}, ["dtype='int4'", "fp32", "fp16", "bf16", "int8"]),
        ({"coefficients_dtype": "fp64"}, ["coefficients_dtype='fp64'", "fp16"]),
        ({"coefficients": "perhaps"}, ["coefficients='perhaps'"]),
        ({"ratio": 0.5}, ["ratio=0.5"]),
        ({"rules": "layer*:m=0.5"}, ["layer*:m=0.5", "list of rules"]),
        ({"rules": ["layer*:m=0"]}, ["m='0'", "greater than 0"]),
        ({"rules": ["layer*:m=nan"]}, ["m='nan'"]),
        ({"rules": ["layer*:m=1.25"]}, ["layer*", "m=1.25", "allow_expansion"]),
        ({"rules": [{"pattern": "layer*", "n": 3}]}, ["n=3"]),
    ],
    ids=str,
)
def test_a_bad_value_is_named_with_what_is_allowed(
    settings: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(SpecError) as error:
        LegoSpec(**settings)
    assert_message_has(error, *parts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rules", [5, None, [3]], ids=str)
def test_rules_of_a_wrong_type_are_a_spec_error(rules: Any) -> None:
    with pytest.raises(SpecError, match="rule"):
        LegoSpec(rules=rules)


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(SpecError) as error:
        LegoSpec(m=-1, o=0, k=0, speed=9)  # type: ignore[call-arg]
    assert_message_has(error, "m=-1", "o=0", "k=0", "speed=9")
    assert isinstance(error.value, UsageError)
    assert error.value.exit_code == 2


def test_m_above_one_needs_allow_expansion() -> None:
    spec = LegoSpec(m=2, rules=["fc:m=4"], allow_expansion=True)
    assert (spec.m, spec.for_layer("fc").m) == (2, 4)
    assert LegoSpec(m=1).m == 1


def test_the_defaults() -> None:
    spec = LegoSpec()
    assert (spec.m, spec.o, spec.k, spec.coefficients) == (0.5, 2, 1, True)
    assert (spec.dtype, spec.coefficients_dtype) == ("fp32", "fp16")
    assert (spec.rules, spec.only, spec.skip) == ((), (), ())
    assert (spec.linear, spec.allow_expansion) == (False, False)


def test_a_spec_is_frozen_and_equals_its_dump() -> None:
    spec = LegoSpec(m=0.25, rules=["layer2.*:o=4,coefficients=false"], skip="fc")
    with pytest.raises(ValueError, match="frozen"):
        spec.m = 0.5
    assert LegoSpec(**spec.model_dump()) == spec
    assert spec.skip == ("fc",)


def test_a_rule_is_parsed_from_text() -> None:
    rule = Rule.parse("layer4.*:m=0.25, o=4,k=3,coefficients=false,dtype=bf16")
    assert rule == Rule(pattern="layer4.*", m=0.25, o=4, k=3, coefficients=False, dtype="bf16")
    assert Rule.parse("fc:k=2") == Rule(pattern="fc", k=2)


def test_colons_of_a_regular_expression_belong_to_the_pattern() -> None:
    rule = Rule.parse("re:layer(?:1|2).*:m=0.25")
    assert (rule.pattern, rule.m) == ("re:layer(?:1|2).*", 0.25)


@pytest.mark.parametrize(
    "text", ["", "layer4.*", ":m=0.5", "layer4.*:", "layer4.*:m", "layer4.*:m=0.5,o", "re:layer.*"]
)
def test_the_error_for_a_malformed_rule_shows_the_right_form(text: str) -> None:
    with pytest.raises(SpecError) as error:
        Rule.parse(text)
    assert_message_has(error, repr(text), "PATTERN:key=value", "layer4.*:m=0.25,o=4,k=4")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a:m=-1", "m='-1'"),
        ("a:o=0", "o='0'"),
        ("a:k=1.5", "k='1.5'"),
        ("a:splits=2", "splits='2'"),
        ("a:dtype=fp8", "dtype='fp8'"),
        ("a:m=", "m=''"),
        ("a:pattern=b", "pattern"),
    ],
)
def test_the_error_for_a_bad_setting_of_a_rule_names_it(text: str, part: str) -> None:
    with pytest.raises(SpecError) as error:
        Rule.parse(text)
    assert_message_has(error, part)


def test_a_setting_given_twice_in_one_rule_is_refused() -> None:
    with pytest.raises(SpecError, match="m"):
        Rule.parse("layer4.*:m=0.5,m=0.25")


def test_the_first_matching_rule_wins_and_other_settings_stay() -> None:
    spec = LegoSpec(
        m=0.5, o=2, k=1, rules=["layer1.0.conv1:k=4", "layer1.*:m=0.25,o=4", "layer*:dtype=fp16"]
    )
    first, second, third, none = map(
        spec.for_layer, ["layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "fc"]
    )
    assert (first.m, first.o, first.k, first.dtype) == (0.5, 2, 4, "fp32")
    assert (second.m, second.o, second.k, second.dtype) == (0.25, 4, 1, "fp32")
    assert (third.m, third.o, third.k, third.dtype) == (0.5, 2, 1, "fp16")
    assert none == spec


def test_a_rule_can_switch_coefficients_off_and_on() -> None:
    spec = LegoSpec(coefficients=False, rules=["fc:coefficients=true"])
    assert spec.for_layer("fc").coefficients is True
    assert spec.for_layer("stem.conv").coefficients is False


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("fc", ["fc"]),
        ("layer1.0.conv1", ["layer1.0.conv1"]),
        ("layer1", []),
        ("layer1*", ["layer1.0.conv1", "layer1.0.conv2"]),
        ("layer?.0.conv2", ["layer1.0.conv2", "layer2.0.conv2"]),
        ("*.conv[12]", NAMES[1:5]),
        ("LAYER1*", []),
        ("re:layer[12].0.conv1", ["layer1.0.conv1", "layer2.0.conv1"]),
        ("re:layer", []),
        ("re:.*conv", ["stem.conv"]),
        ("*", NAMES),
    ],
)
def test_patterns_are_names_globs_or_full_regular_expressions(
    pattern: str, matched: list[str]
) -> None:
    assert [name for name in NAMES if matches(pattern, name)] == matched


def test_a_name_with_brackets_matches_itself() -> None:
    assert matches("blocks[0].conv", "blocks[0].conv")
    assert not matches("blocks[0].conv", "blocks[1].conv")


def test_a_malformed_regular_expression_is_refused() -> None:
    with pytest.raises(PatternError, match=r"'re:layer\(' is not a regular expression"):
        matches("re:layer(", "layer1")


@pytest.mark.parametrize(
    ("spec", "option"),
    [
        (LegoSpec(rules=["layer1.0.conv9:k=2"]), "--rule"),
        (LegoSpec(only=["layer1.0.conv9"]), "--only"),
        (LegoSpec(skip=["layer1.0.conv9"]), "--skip"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_similar_names(
    spec: LegoSpec, option: str
) -> None:
    with pytest.raises(PatternError) as error:
        check_patterns(spec, NAMES)
    assert_message_has(
        error, option, "'layer1.0.conv9'", "6 layers", "'layer1.0.conv1'", "'layer1.0.conv2'"
    )
    assert "'fc'" not in str(error.value)


def test_a_pattern_unlike_all_names_is_refused_with_some_names() -> None:
    with pytest.raises(PatternError, match=r"'stem\.conv'"):
        check_patterns(LegoSpec(skip=["@@@"]), NAMES)


def test_patterns_that_all_match_are_accepted() -> None:
    check_patterns(
        LegoSpec(rules=["layer*:k=2"], only=["re:.*conv1", "fc"], skip=["stem.*"]), NAMES
    )


def test_names_exactly_reads_rules_and_only_without_wildcards() -> None:
    spec = LegoSpec(
        rules=["stem.conv:k=2", "layer1.*:k=2"], only=["fc", "layer2.*"], skip=["layer2.0.conv1"]
    )
    assert [name for name in NAMES if spec.names_exactly(name)] == ["stem.conv", "fc"]


@pytest.mark.parametrize(("channels", "n_split", "width"), [(6, 2, 3), (7, 2, 4), (7, 4, 2)])
def test_the_width_of_a_fragment_is_rounded_up(channels: int, n_split: int, width: int) -> None:
    shape = UnitShape(8, channels, (3, 3), 1, 4, n_split, 3)
    assert shape.width == width
    assert shape.n_fragments == 8 * n_split
    assert shape.n_slots == 24 * n_split
    assert shape.n_filter_values == 4 * width * 9
