"""The help lists options under headings."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner
from legocompress_cli.help import MAIN_JOB, OPTION_HEADINGS
from legocompress_cli.main import cli


def sections(command: str) -> dict[str, list[str]]:
    """The options under each heading of a command's help."""
    text = CliRunner().invoke(cli, [command, "--help"]).output
    parts = re.split(r"^(\w[\w ]*):\n", text, flags=re.MULTILINE)[1:]
    return {
        title: re.findall(r"^  (?:-\w, )?(--[\w-]+)", part, re.MULTILINE)
        for title, part in zip(parts[::2], parts[1::2], strict=True)
        if title != "Usage"
    }


def test_options_stand_under_headings() -> None:
    found = sections("convert")
    assert list(found) == ["What to compress", "Network", "Data", "Output", "Other"]
    assert {"--m", "--rule", "--max-size"} <= set(found["What to compress"])
    assert found["Data"][:2] == ["--calibrate", "--images"]
    assert {"--out", "--json", "--log-json"} <= set(found["Output"])
    assert {"--seed", "--help"} <= set(found["Other"])


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_no_option_is_lost_or_listed_twice(command: str) -> None:
    listed = [name for names in sections(command).values() for name in names]
    expected = {
        next(name for name in option.opts if name.startswith("--"))
        for option in cli.commands[command].params
        if option.param_type_name == "option"
    }
    assert sorted(listed) == sorted({*expected, "--help"})


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_an_option_is_explained_in_one_sentence(command: str) -> None:
    for option in cli.commands[command].params:
        text = getattr(option, "help", None) or ""
        assert re.fullmatch(r"[A-Z][^\n]*", text) or option.param_type_name == "argument"
        assert text.count(". ") <= text.count(". [default"), option.opts


def test_the_names_of_headings_are_those_of_options() -> None:
    names = {option.name for command in cli.commands.values() for option in command.params}
    assert {name for group in OPTION_HEADINGS.values() for name in group} <= names


def test_the_main_job_names_commands_and_options_that_exist() -> None:
    for words, _ in MAIN_JOB:
        name, *rest = words.split()
        options = {opt for option in cli.commands[name].params for opt in option.opts}
        assert {word for word in rest if word.startswith("--")} <= options
