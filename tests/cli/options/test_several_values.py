"""Options that take several values."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner
from legocompress_cli.options import SeveralValues


@click.command(cls=SeveralValues)
@click.argument("name")
@click.option("--batch", type=int, multiple=True)
@click.option("--rounds", type=int, default=3)
def command(name: str, batch: tuple[int, ...], rounds: int) -> None:
    click.echo(f"{name} {batch} {rounds}")


@pytest.mark.parametrize(
    ("words", "output"),
    [
        ("net --batch 1 8", "net (1, 8) 3"),
        ("--batch 1 8 net", "net (1, 8) 3"),
        ("--batch 1 8 --rounds 2 net", "net (1, 8) 2"),
        ("net --batch 1 --batch 8", "net (1, 8) 3"),
        ("net", "net () 3"),
    ],
)
def test_several_values_after_one_option(words: str, output: str) -> None:
    result = CliRunner().invoke(command, words.split())
    assert result.output == f"{output}\n"


def test_the_first_value_must_fit_the_type() -> None:
    result = CliRunner().invoke(command, ["net", "--batch", "x"])
    assert result.exit_code == 2
    assert "Invalid value" in result.output
