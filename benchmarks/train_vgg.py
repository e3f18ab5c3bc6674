"""Train the VGG-like network that the calibration benchmarks use beside the shipped one.

    python -m benchmarks.train_vgg --data-dir fashion-mnist --cache vgg.safetensors

Claim: none of its own; calibration_fashion and calibration_rivals train it themselves where --cache
does not exist. A chain of seven convs with BatchNorm, without residuals, 0.41M parameters: dense
92.73 % after six epochs. Prints one line per epoch. Takes some minutes on one core.
"""

from __future__ import annotations

import torch

from benchmarks.common.arguments import add_fashion_folder, add_vgg_arguments, make_parser
from benchmarks.common.tasks import open_vgg


def main() -> None:
    """Train the network and write it to --cache."""
    parser = make_parser(__doc__)
    add_fashion_folder(parser)
    add_vgg_arguments(parser)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    open_vgg(options.data_dir, options.cache, options.train_epochs)


if __name__ == "__main__":
    main()
