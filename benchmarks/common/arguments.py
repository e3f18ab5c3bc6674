"""Command lines of the benchmarks: help from the docstring, paths that are checked at once."""

from __future__ import annotations

import argparse
from pathlib import Path

FASHION_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)

Setting = tuple[float, int, int]


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of the script."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parse_folder(text: str) -> Path:
    """A folder that exists."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return path


def parse_file(text: str) -> Path:
    """A file that exists."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a file")
    return path


def parse_fashion_folder(text: str) -> Path:
    """A folder that holds the four files of Fashion-MNIST."""
    path = parse_folder(text)
    missing = [name for name in FASHION_FILES if not (path / name).is_file()]
    if missing:
        raise argparse.ArgumentTypeError(
            f"{text} lacks {', '.join(missing)}; "
            "https://github.com/zalandoresearch/fashion-mnist has them"
        )
    return path


def parse_photo_folder(text: str) -> Path:
    """A folder that holds photos."""
    path = parse_folder(text)
    if not any(path.glob("*.jpg")):
        raise argparse.ArgumentTypeError(f"there is no .jpg in {text}")
    return path


def parse_setting(text: str) -> Setting:
    """The numbers m, o and k of a text such as `0.5,2,4`."""
    try:
        m, o, k = text.split(",")
        return float(m), int(o), int(k)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not M,O,K, such as 0.5,2,4") from None


def add_run_arguments(
    parser: argparse.ArgumentParser, epochs: int, out: str = "calibration.jsonl"
) -> None:
    """Add the options of every calibration benchmark."""
    parser.add_argument("--out", type=Path, default=Path(out), help="file of rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=epochs, help="of tuning all layers together")


def add_fashion_folder(parser: argparse.ArgumentParser) -> None:
    """Add `--data-dir`, which is required."""
    parser.add_argument(
        "--data-dir",
        type=parse_fashion_folder,
        required=True,
        help="folder of Fashion-MNIST's four idx.gz files",
    )


def add_vgg_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the VGG-like network is stored and how long it is trained."""
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("vgg.safetensors"),
        help="weights of the VGG-like network; it is trained where this file does not exist",
    )
    parser.add_argument("--train-epochs", type=int, default=6, help="of the VGG-like network")


def add_photo_folder(parser: argparse.ArgumentParser) -> None:
    """Add `--photos`, which is required."""
    parser.add_argument(
        "--photos", type=parse_photo_folder, required=True, help="folder of photos, .jpg"
    )
