"""Conversion and calibration on Fashion-MNIST, as calibration_fashion and calibration_rivals share.

Both measure our rows by network, seed, setting and sizing, and group them for their tables.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

import legocompress as lego
from benchmarks.common.arguments import (
    Setting,
    add_fashion_folder,
    add_run_arguments,
    add_vgg_arguments,
    make_parser,
    parse_setting,
)
from benchmarks.common.results import Clock, Results, Row
from benchmarks.common.sizing import add_terms_argument, make_sizing_key, size_layers
from benchmarks.common.tasks import NETWORKS, Task, open_task
from benchmarks.rivals.costs import count_macs, count_stored_bytes
from legocompress.calibrate.calibration import EPOCHS

TARGETS = {(0.5, 2, 1): 1.5, (0.5, 2, 4): 0.6, (0.25, 4, 1): 6.0, (0.25, 4, 4): 1.2}  # points lost

TaskOpener = Callable[[str], Task]


def make_fashion_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of both scripts."""
    parser = make_parser(doc)
    add_run_arguments(parser, EPOCHS)
    add_terms_argument(parser)
    add_fashion_folder(parser)
    add_vgg_arguments(parser)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument(
        "--settings", nargs="+", type=parse_setting, default=list(TARGETS), metavar="M,O,K"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--images", type=int, default=2048, help="without labels")
    parser.add_argument("--layers", action="store_true", help="also without tuning all together")
    return parser


def make_task_opener(options: argparse.Namespace) -> TaskOpener:
    """A function that opens the task of a network, each of them once."""
    return functools.cache(
        lambda name: open_task(name, options.data_dir, options.cache, options.train_epochs)
    )


def list_runs(options: argparse.Namespace) -> Iterator[tuple[Row, Setting]]:
    """The key of each run that the options ask for, with its setting."""
    for network in options.network:
        for seed in options.seeds:
            for m, o, k in options.settings:
                key = {"network": network, "seed": seed, "m": m, "o": o, "k": k}
                yield {**key, "images": options.images, "epochs": options.epochs}, (m, o, k)


def calibrate_task(task: Task, setting: Setting, key: Row, without_tuning: bool) -> Row:
    """Convert and calibrate a copy of the task's network: accuracies, times and costs.

    Args:
        task: the network and its data.
        setting: m, o and k.
        key: of the row: seed, images, epochs and sizing are used.
        without_tuning: measure calibration layer by layer alone, too.
    """
    seed, images, epochs = key["seed"], key["images"], key["epochs"]
    chosen = task.draw_images(images, seed)
    student = copy.deepcopy(task.network)
    clock = Clock()
    m, o, k = setting
    spec = size_layers(student, lego.LegoSpec(m=m, o=o, k=k), key["sized"], key.get("terms"))
    lego.convert_(student, lego.plan(student, spec), seed)
    times = clock.read()
    clustered = task.measure_accuracy(student)
    row: Row = {"dense": task.dense_accuracy, "clustered": clustered}
    if without_tuning:
        alone = copy.deepcopy(student)
        lego.calibrate_(alone, task.network, chosen, seed=seed, epochs=0)
        row["layers_only"] = task.measure_accuracy(alone)
    clock = Clock()
    record = lego.calibrate_(student, task.network, chosen, seed=seed, epochs=epochs)
    more = clock.read()
    times = {name: times[name] + more[name] for name in times}
    return {
        **row,
        "calibrated": task.measure_accuracy(student),
        "held_out_error": record.error_after,
        **times,
        "threads": torch.get_num_threads(),
        "bytes": count_stored_bytes(student),
        "macs": count_macs(student),
        "dense_bytes": count_stored_bytes(task.network),
        "dense_macs": count_macs(task.network),
    }


def measure_ours(
    results: Results,
    options: argparse.Namespace,
    task_opener: TaskOpener,
    run: tuple[Row, Setting],
    sizing: str,
) -> Row:
    """The row of one run and sizing, measured where it is missing."""
    key, setting = run
    key = {**key, **make_sizing_key(sizing, options.terms)}
    return results.measure(
        {"table": "fashion", **key},
        lambda: calibrate_task(task_opener(key["network"]), setting, key, options.layers),
    )


def group_rows(
    results: Results, options: argparse.Namespace, sizings: Sequence[str]
) -> Iterator[tuple[str, Setting, str, list[Row]]]:
    """Rows of all seeds by network, setting and sizing."""
    for network in NETWORKS:
        common = {"network": network, "images": options.images, "epochs": options.epochs}
        for m, o, k in options.settings:
            for sizing in sizings:
                key = make_sizing_key(sizing, options.terms)
                rows = results.select(table="fashion", m=m, o=o, k=k, **key, **common)
                if rows:
                    yield network, (m, o, k), sizing, rows
