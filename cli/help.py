"""The text of `--help`: commands in the order of the pipeline, options under headings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import click

# What a first reader wants to do, one line each.
MAIN_JOB = (
    ("convert resnet50 --calibrate PHOTOS --out net", "compress"),
    ("report net", "what it gained"),
    ("finetune net --recipe imagenet-short --data-dir DIR", "train"),
    ("benchmark net", "deploy, time"),
    ("export net --to onnx", "hand over"),
)
# The heading of each option, by the name of its parameter; all others stand under "Other".
OPTION_HEADINGS: dict[str, tuple[str, ...]] = {
    "What to compress": (
        "m", "o", "k", "max_size", "max_macs", "spend_by", "coefficients", "dtype", "share",
        "rules", "only", "skip", "linear", "allow_expansion", "precision",
    ),
    "Network": (
        "weights", "pretrained", "num_classes", "in_chans", "model_kwargs", "original",
        "original_weights",
    ),
    "Data": (
        "data", "calibration_data", "images", "crops", "data_dir", "split", "labelled",
        "class_map", "no_labels", "batch_size", "workers", "img_size", "mean", "std",
        "interpolation", "crop_pct",
    ),
    "Output": (
        "out", "force", "as_json", "html", "log_json", "log_to", "tensorboard", "dry_run", "kind",
        "form", "save", "layers", "message", "private",
    ),
}  # fmt: skip
OTHER = "Other"
LONGEST = 200  # characters of a command's description; longer lines wrap
_HEADING_OF = {name: title for title, names in OPTION_HEADINGS.items() for name in names}
_PLACES = list(_HEADING_OF)


class SectionedCommand(click.Command):
    """A command whose help lists its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one definition list per heading that has options."""
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in (*OPTION_HEADINGS, OTHER)}
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        for option in sorted(options, key=_place_in_help):
            record = option.get_help_record(ctx)
            if record is not None:
                rows[_HEADING_OF.get(option.name or "", OTHER)].append(record)
        _write_sections(formatter, rows.items())


def _place_in_help(option: click.Option) -> int:
    """The place of an option's name in the headings; unknown names come last, as declared."""
    name = option.name or ""
    return _PLACES.index(name) if name in _PLACES else len(_PLACES)


class PipelineGroup(click.Group):
    """The group of all commands: its help shows the main job, then the commands by headings.

    Attributes:
        headings: the names of the commands under each heading, in the order of the pipeline.
    """

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        self.headings: dict[str, list[str]] = {}

    def add_section(self, title: str, commands: Iterable[click.Command]) -> None:
        """Add commands under a heading of the help."""
        for command in commands:
            self.add_command(command)
            self.headings.setdefault(title, []).append(str(command.name))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the main job, the commands under their headings, and the options."""
        width = max(len(words) for words, _ in MAIN_JOB)
        with formatter.section("The main job"):
            for words, purpose in MAIN_JOB:
                formatter.write(f"  legocompress {words:<{width}}  # {purpose}\n")
        sections = (
            (title, [(name, self.commands[name].get_short_help_str(LONGEST)) for name in names])
            for title, names in self.headings.items()
        )
        _write_sections(formatter, sections)
        click.Command.format_options(self, ctx, formatter)


def _write_sections(
    formatter: click.HelpFormatter, sections: Iterable[tuple[str, Sequence[tuple[str, str]]]]
) -> None:
    for title, rows in sections:
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)
