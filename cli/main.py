"""The `legocompress` command: its sub-commands, and the exit code of each kind of error."""

from __future__ import annotations

import logging
import sys
import warnings

import click

from legocompress.errors import LegoError

from .analyze import analyze
from .benchmark import benchmark
from .calibrate import calibrate
from .compare import compare
from .convert import convert, inspect
from .demo import demo
from .evaluate import evaluate
from .export import export
from .finetune import finetune
from .help import PipelineGroup
from .push import push
from .quantize import quantize
from .recipes import recipes
from .report import report


@click.group(
    cls=PipelineGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(package_name="legocompress")
@click.option("--debug", is_flag=True, help="Show tracebacks and library warnings.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Compress pretrained CNNs with Lego filters: smaller files, fewer multiply-accumulates."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
    if not debug:
        warnings.simplefilter("ignore")
        logging.getLogger("timm").setLevel(logging.ERROR)


# By the headings of the help, in the order of the pipeline.
COMMANDS: dict[str, tuple[click.Command, ...]] = {
    "Try it": (demo,),
    "Compress": (inspect, analyze, convert, calibrate, quantize),
    "Train": (recipes, finetune),
    "Measure": (report, evaluate, compare, benchmark),
    "Use elsewhere": (export, push),
}
for heading, commands in COMMANDS.items():
    cli.add_section(heading, commands)


def main() -> None:
    """Run the command line; an error of this package becomes one sentence and its exit code."""
    debug = "--debug" in sys.argv
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; no output was left half written.", err=True)
        sys.exit(130)
    except LegoError as error:
        if debug:
            raise
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except MemoryError:
        if debug:
            raise
        click.echo("Error: out of memory; use a smaller model or input.", err=True)
        sys.exit(1)
