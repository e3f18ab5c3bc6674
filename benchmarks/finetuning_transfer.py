"""Whether to transfer a network to new classes before or after compression.

    python -m benchmarks.finetuning_transfer --data emoji64.npz \\
        --weights squeezenet1_1.safetensors --set amp=bf16 seed=1

Claim: transfer first, then convert and calibrate with the training images. Takes ImageNet's
SqueezeNet 1.1 to 9 classes of small pictures: dense, compressed before and compressed after. Prints
ideal size and test accuracy of each. Takes about half an hour on one core.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import legocompress as lego
from benchmarks.common.arguments import make_parser, parse_file
from benchmarks.common.networks import SQUEEZENET
from benchmarks.common.tables import format_head, format_row
from legocompress.data.images import preprocessing
from legocompress.finetune.loop import finetune_
from legocompress.report.measurement import measure

N_CLASSES = 9
PREPROCESS = {**SQUEEZENET, "input_size": (64, 64), "crop_pct": 1.0}


@dataclass(frozen=True)
class Transfer:
    """The data and the recipes of one run of the script."""

    data: str
    recipe: Any
    distilling: Any

    def tune(self, model: nn.Module, teacher: nn.Module | None = None) -> nn.Module:
        """Train with the labels, and with a teacher where there is one."""
        recipe = self.recipe if teacher is None else self.distilling
        return finetune_(model, recipe, *lego.open_training(model, recipe, self.data), teacher)

    def calibrate(self, model: nn.Module, teacher: nn.Module) -> nn.Module:
        """Calibrate with all training images."""
        images, transform = (
            lego.open_training(teacher, self.recipe, self.data)[0],
            preprocessing(teacher)[0],
        )
        dataset: Any = images.dataset
        lego.calibrate_(model, teacher, torch.stack([transform(image) for image, _ in dataset]))
        return model

    def print_row(self, model: nn.Module, label: str) -> nn.Module:
        """Print the size and the test accuracy of a network, which is returned."""
        images = lego.open_training(model, self.recipe, self.data)[1]
        top1 = lego.evaluate(model, images.batches(64)).top1
        size = measure(model).totals()["bits"] / 8e6
        print(format_row([label, f"{size:.2f} MB", f"{top1:.2f}"]), flush=True)
        return model


def run_transfer(args: argparse.Namespace) -> None:
    """Print the table, one network after the other."""
    changes = ["data.holdout=0", *args.set]
    recipe = lego.load_recipe("finetune-small-data", changes)
    distilling = lego.load_recipe("finetune-small-data", [*changes, "distill={}"])
    run = Transfer(str(args.data), recipe, distilling)

    def create() -> nn.Module:
        return lego.create("torchvision/squeezenet1_1", weights=args.weights, preprocess=PREPROCESS)

    def convert(model: nn.Module) -> nn.Module:
        return lego.convert_(model, lego.plan(model, lego.LegoSpec(m=0.5, o=2, k=args.k)))

    print(format_head(["network", "ideal size", "test top-1"]))
    teacher = run.print_row(run.tune(lego.reset_classifier_(create(), N_CLASSES)), "dense")
    compressed = lego.reset_classifier_(convert(create()), N_CLASSES)
    run.print_row(run.tune(compressed), "compressed, then transferred")
    clustered = run.print_row(convert(copy.deepcopy(teacher)), "transferred, then compressed")
    calibrated = copy.deepcopy(clustered)
    run.print_row(run.tune(clustered), "the same, trained on")
    run.calibrate(calibrated, teacher)
    run.print_row(calibrated, "transferred, then compressed and calibrated")
    run.print_row(
        run.tune(calibrated, teacher), "the same, trained on, the transferred network teaching"
    )


def main() -> None:
    """Do what the command line says."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=parse_file, required=True, help="emoji64.npz")
    parser.add_argument(
        "--weights", type=parse_file, required=True, help="squeezenet1_1's ImageNet weights"
    )
    parser.add_argument("--set", nargs="*", default=[], help="changes of the recipe")
    parser.add_argument("--k", type=int, default=4, help="terms per slot")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run_transfer(args)


if __name__ == "__main__":
    main()
