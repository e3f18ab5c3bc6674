"""A click command whose repeatable options take several values: `--batch 1 8`."""

from __future__ import annotations

from typing import Any

import click

from ..help import SectionedCommand


class SeveralValues(SectionedCommand):
    """A command that reads `--batch 1 8` as click reads `--batch 1 --batch 8`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option's name before each further value of a repeatable option.

        The values of an option end at the next option, or at the first word that the option's
        type does not accept, which is then an argument of the command.
        """
        value_types = {
            name: option.type
            for option in self.params
            if isinstance(option, click.Option) and option.multiple
            for name in option.opts
        }
        repeated: list[str] = []
        option: str | None = None
        is_first_value = False
        for word in args:
            if word.startswith("-"):
                option = word if word in value_types else None
                is_first_value = True
            elif option is not None:
                if not is_first_value:
                    if _is_value(value_types[option], word):
                        repeated.append(option)
                    else:
                        option = None
                is_first_value = False
            repeated.append(word)
        return super().parse_args(ctx, repeated)


def _is_value(value_type: Any, word: str) -> bool:
    try:
        value_type.convert(word, None, None)
    except click.BadParameter:
        return False
    return True
