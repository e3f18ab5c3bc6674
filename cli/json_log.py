"""`--log-json`: progress of a long command as JSON lines, for machines that watch it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import IO, Any

import click

from legocompress.errors import OutputError
from legocompress.finetune.distributed import read_processes
from legocompress.finetune.loggers import JsonLines

KEY = "legocompress.json_log"  # in the context of the command


def _open_log(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """Open the log before the command runs; of several processes, only the first has one."""
    if path is None or context.resilient_parsing or not read_processes().first:
        return
    if path == "-":
        stream: IO[str] = sys.stdout
        context.with_resource(contextlib.redirect_stdout(sys.stderr))
    else:
        try:
            stream = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 the context closes it
            context.with_resource(stream)
        except OSError as error:
            raise OutputError(
                f"--log-json {path!r} cannot be written: {error.strerror}; name a file in a "
                "folder that exists"
            ) from error
    log = JsonLines(stream)
    log.write("start", command=context.info_name)
    context.meta[KEY] = log


log_json_option = click.option(
    "--log-json",
    metavar="FILE",
    callback=_open_log,
    expose_value=False,
    help="Append progress to a file as JSON lines; '-' is standard output, which then has only "
    "these.",
)


def current_log() -> JsonLines | None:
    """The log of the command that runs now; None if it has none."""
    context: Any = click.get_current_context(silent=True)
    return None if context is None else context.meta.get(KEY)
