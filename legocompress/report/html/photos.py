"""Find the photos on which a compressed network and its original disagree most."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from timm.data import ImageNetInfo, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from legocompress.data.images import Images
from legocompress.models.outputs import find_logits
from legocompress.models.probe import evaluating, model_cfg
from legocompress.report.html.pictures import Picture, draw_thumbnail

MAX_PHOTOS = 256  # that both networks see
N_SHOWN = 8
N_TOP = 5
BATCH = 16


@dataclass(frozen=True)
class Guess:
    """A class that a network answers, and its probability from 0 to 1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Disagreement:
    """A photo, and the likeliest classes by the original and by the compressed network.

    `distance` is the total variation distance of the two distributions, from 0 to 1.
    `same_answer` is whether both have the same first class.
    """

    photo: Picture
    distance: float
    original: tuple[Guess, ...]
    compressed: tuple[Guess, ...]
    same_answer: bool


@dataclass(frozen=True)
class Comparison:
    """How two networks answer on some photos; the worst of them first.

    `agreement` is the percentage of the photos for which both have the same first class.
    """

    n_photos: int
    agreement: float
    worst: tuple[Disagreement, ...]


def compare_on_photos(
    model: nn.Module,
    original: nn.Module,
    photos: Images,
    class_names: Sequence[str] | None = None,
    on_photos: Callable[[int], None] | None = None,
) -> Comparison | None:
    """Run two networks on at most `MAX_PHOTOS` photos, drawn at random with seed 0.

    Args:
        model: the compressed network.
        original: the network that it was converted from, on the same device.
        photos: preprocessed for them.
        class_names: one per output; the default is what `find_class_names` knows.
        on_photos: called with the number of photos after each batch.

    Returns:
        None where the networks do not answer with the same classes (N, classes).

    Raises:
        DataError: an image cannot be read.
    """
    if not isinstance(photos.dataset, IterableDataset):
        photos = photos.sample(MAX_PHOTOS)
    device = next(model.parameters()).device
    worst: list[tuple[bool, float, int, Tensor, Tensor, Tensor]] = []
    n_photos = n_same = 0
    for images, _ in islice(photos.batches(BATCH), MAX_PHOTOS // BATCH):
        with evaluating(model), evaluating(original):
            logits = find_logits(model(images.to(device)), len(images))
            target_logits = find_logits(original(images.to(device)), len(images))
        if logits is None or target_logits is None or logits.shape != target_logits.shape:
            return None
        answers, targets = (y.float().softmax(1).cpu() for y in (logits, target_logits))
        for image, answer, target in zip(images, answers, targets, strict=True):
            same = bool(answer.argmax() == target.argmax())
            distance = float((answer - target).abs().sum()) / 2
            # The position decides between equal photos, so that no tensors are compared.
            entry = (not same, distance, -n_photos, image, target, answer)
            (heapq.heappush if len(worst) < N_SHOWN else heapq.heappushpop)(worst, entry)
            n_photos += 1
            n_same += same
        if on_photos is not None:
            on_photos(len(images))
    if not n_photos:
        return None
    names = class_names or find_class_names(model, worst[0][4].numel())
    cfg = resolve_data_config({}, model=model)
    return Comparison(
        n_photos,
        100 * n_same / n_photos,
        tuple(
            Disagreement(
                draw_thumbnail(image, cfg["mean"], cfg["std"]),
                distance,
                _list_guesses(target, names),
                _list_guesses(answer, names),
                not is_different,
            )
            for is_different, distance, _, image, target, answer in sorted(worst, reverse=True)
        ),
    )


def find_class_names(model: nn.Module, n_classes: int) -> list[str] | None:
    """Find the names of a network's classes: in its configuration, or by 1,000 outputs ImageNet's.

    Returns:
        None where they are not known.
    """
    cfg = model_cfg(model)
    for key in ("label_descriptions", "label_names"):
        labels = cfg.get(key)
        if isinstance(labels, dict) and isinstance(cfg.get("label_names"), (list, tuple)):
            labels = [labels.get(name, name) for name in cfg["label_names"]]
        if isinstance(labels, (list, tuple)) and len(labels) == n_classes:
            return [str(label) for label in labels]
    if n_classes == 1000:
        imagenet = ImageNetInfo()
        return [imagenet.index_to_description(position) for position in range(n_classes)]
    return None


def _list_guesses(probabilities: Tensor, names: Sequence[str] | None) -> tuple[Guess, ...]:
    values, positions = torch.topk(probabilities, min(N_TOP, len(probabilities)))
    return tuple(
        Guess(
            f"class {position}" if names is None or position >= len(names) else names[position],
            value,
        )
        for value, position in zip(values.tolist(), positions.tolist(), strict=True)
    )
