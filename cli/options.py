"""Options that several commands share, and the progress bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
import yaml
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import legocompress as lego
from legocompress.calibrate.calibration import EPOCHS
from legocompress.errors import SpecError, UsageError, first_line
from legocompress.models.source import source_of
from legocompress.spec import LegoSpec

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def _stack(options: list[Callable[[CommandT], CommandT]]) -> Callable[[CommandT], CommandT]:
    def decorate(command: CommandT) -> CommandT:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
force_option = click.option("--force", is_flag=True, help="Replace an output that exists.")
device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Device to compute on: cpu, cuda, cuda:1, ...",
)

model_options: Callable[[CommandT], CommandT] = _stack(
    [
        click.option(
            "--weights",
            type=click.Path(path_type=Path),
            help="State dict file (safetensors or torch) instead of the library's weights.",
        ),
        click.option(
            "--pretrained/--no-pretrained",
            default=True,
            show_default=True,
            help="Load the library's weights, or take random ones.",
        ),
        click.option("--num-classes", type=click.IntRange(0), help="Outputs of the classifier."),
        click.option("--in-chans", type=click.IntRange(1), help="Channels of the image (timm)."),
        click.option(
            "--model-kwargs",
            multiple=True,
            metavar="KEY=VALUE",
            help="Further argument of the architecture; the value is read as YAML.",
        ),
        click.option("--img-size", type=click.IntRange(1), help="Height and width of the input."),
        click.option("--mean", type=float, multiple=True, help="Mean; once, or once a channel."),
        click.option("--std", type=float, multiple=True, help="Standard deviation; likewise."),
        click.option("--interpolation", help="Resizing: bilinear, bicubic, nearest, ..."),
        click.option("--crop-pct", type=click.FloatRange(0, min_open=True), help="Centre crop."),
    ]
)

calibration_options: Callable[[CommandT], CommandT] = _stack(
    [
        click.option(
            "--images", type=click.IntRange(10), default=1024, help="Images to calibrate with."
        ),
        click.option(
            "--crops",
            type=click.IntRange(1),
            default=1,
            help="Random crops of each image, where there are few; with 1 images stay whole.",
        ),
        click.option(
            "--epochs",
            type=click.IntRange(0),
            default=EPOCHS,
            help="Passes over them that tune all layers together; 0 repairs layer by layer alone.",
        ),
        click.option("--data-dir", help="Root of a named data set."),
        click.option("--split", default="train", help="Split of a named data set."),
        click.option(
            "--labelled",
            metavar="DATA",
            help="Labelled images on which to tell accuracy before and after; no step uses them.",
        ),
        click.option(
            "-b",
            "--batch-size",
            type=click.IntRange(1),
            default=32,
            help="Images run at once.",
        ),
        click.option(
            "-j", "--workers", type=click.IntRange(0), default=0, help="Processes that read images."
        ),
    ]
)

original_options: Callable[[CommandT], CommandT] = _stack(
    [
        click.option("--original", help="The original network, as a model name or folder."),
        click.option(
            "--original-weights",
            type=click.Path(path_type=Path),
            help="Weights of the original, when it is the architecture that the folder names.",
        ),
    ]
)

spec_options: Callable[[CommandT], CommandT] = _stack(
    [
        click.option(
            "--m",
            type=float,
            default=0.5,
            show_default=True,
            help="Lego filters per output channel.",
        ),
        click.option(
            "--o", type=int, default=2, show_default=True, help="Splits of the input channels."
        ),
        click.option(
            "--k",
            type=int,
            default=1,
            show_default=True,
            help="Lego filters summed per slot; with a budget the most of them.",
        ),
        click.option(
            "--max-size",
            type=click.FloatRange(0, 1, min_open=True),
            help="Share of the dense network's size to keep to: m, o and k are chosen by layer.",
        ),
        click.option(
            "--max-macs",
            type=click.FloatRange(0, 1, min_open=True),
            help="Share of the dense network's MACs to keep to, likewise; of Lego filters, "
            "those in use count.",
        ),
        click.option(
            "--coefficients/--binary",
            default=True,
            show_default=True,
            help="A coefficient per slot term, or the paper's plain binary form.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
            default="fp32",
            show_default=True,
            help="What the Lego filters are stored as; int8 has a scale for each filter.",
        ),
        click.option(
            "--rule",
            "rules",
            multiple=True,
            metavar="PATTERN:m=..,o=..,k=..",
            help="Settings for layers by exact name, glob, or re:regex; first match wins.",
        ),
        click.option(
            "--only", multiple=True, metavar="PATTERN", help="Convert these layers alone."
        ),
        click.option("--skip", multiple=True, metavar="PATTERN", help="Leave these layers dense."),
        click.option("--linear", is_flag=True, help="Convert Linear layers too."),
        click.option(
            "--allow-expansion",
            is_flag=True,
            help="Convert even where that makes a layer slower or larger (m > 1, no saving).",
        ),
    ]
)


def read_spec(values: dict[str, Any]) -> LegoSpec:
    """Take the spec's options out of a command's values and make the spec."""
    fields = LegoSpec.model_fields.keys() & values.keys()
    return LegoSpec(**{name: values.pop(name) for name in fields})


def read_budget(values: dict[str, Any]) -> dict[str, float]:
    """Take the options of a budget out of a command's values; empty where there is none.

    Raises:
        UsageError: m or o is given beside a budget.
    """
    pairs = {name: values.pop(name) for name in ("max_size", "max_macs")}
    budget = {name: value for name, value in pairs.items() if value is not None}
    given = click.get_current_context().get_parameter_source
    for name in ("m", "o"):
        if budget and given(name) is ParameterSource.COMMANDLINE:
            option = next(iter(budget)).replace("_", "-")
            raise UsageError(f"--{option} chooses m and o of every layer; leave out --{name}")
    return budget


def read_create_args(values: dict[str, Any]) -> dict[str, Any]:
    """Take the model's options out of a command's values, as `legocompress.create` takes them."""
    size, mean, std = (values.pop(name) for name in ("img_size", "mean", "std"))
    preprocess = {
        "input_size": None if size is None else (size, size),
        "mean": mean or None,
        "std": std or None,
        "interpolation": values.pop("interpolation"),
        "crop_pct": values.pop("crop_pct"),
    }
    return {
        "weights": values.pop("weights"),
        "pretrained": values.pop("pretrained"),
        "num_classes": values.pop("num_classes"),
        "in_chans": values.pop("in_chans"),
        "model_args": dict(_key_value(text) for text in values.pop("model_kwargs")),
        "preprocess": {key: value for key, value in preprocess.items() if value is not None},
    }


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--model-kwargs {text!r} is not of the form KEY=VALUE")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise SpecError(f"--model-kwargs {text!r}: the value is no YAML") from None


def original_of(network: Any, name: str | None, weights: Path | None) -> Any:
    """The original of a compressed network, by name or by weights; None where neither is given."""
    if name is None and weights is None:
        return None
    if name is not None:
        return lego.open_model(name, weights=weights)
    source = source_of(network)
    if source.library is None:
        raise UsageError("--original-weights needs a known architecture; name it with --original")
    named = f"{source.library}/{source.architecture}"
    return lego.create(named, weights=weights, model_args=source.model_args)


def read_device(name: str) -> torch.device:
    """The device of this name, if it is there.

    Raises:
        UsageError: it is unknown or not there.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name!r} cannot be used here: {first_line(error)}") from error
    return device


def progress(quiet: bool = False) -> Progress:
    """A bar with an estimate on standard error; nothing where that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )


class SeveralValues(click.Command):
    """A command whose repeatable options also take several values: --batch 1 8."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Write each further value of a repeatable option with the option's name before it."""
        several = {
            name: option.type
            for option in self.params
            if isinstance(option, click.Option) and option.multiple
            for name in option.opts
        }
        spread: list[str] = []
        option: str | None = None
        for word in args:
            if word.startswith("-"):
                option = word if word in several else None
                fresh = True
            elif option is not None:
                if not fresh:
                    if not _is_value(several[option], word):
                        option = None
                    else:
                        spread.append(option)
                fresh = False
            spread.append(word)
        return super().parse_args(ctx, spread)


def _is_value(kind: Any, word: str) -> bool:
    try:
        kind.convert(word, None, None)
    except click.BadParameter:
        return False
    return True
