"""Make more calibration images from few photos: random crops of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import RandomResizedCrop

from legocompress.data.images import Images, open_images, preprocessing

SCALE = (0.3, 1.0)  # share of the area of a photo that a crop shows
RATIO = (3 / 4, 4 / 3)


def open_crops(
    where: str,
    model: nn.Module,
    n_images: int,
    n_crops: int,
    seed: int = 0,
    data_dir: str | None = None,
    split: str = "train",
) -> Images:
    """Open images without labels: at most `n_images`, drawn at random, `n_crops` crops of each.

    Args:
        where: as `open_images` takes it.
        model: its preprocessing follows the crop.
        n_images: largest number of photos.
        n_crops: crops per photo; 1 means the whole photo.
        seed: of the drawn photos and of the crops.
        data_dir: root of a named data set.
        split: of a named data set.

    Raises:
        DataError: as `open_images` does.
    """
    transform = preprocessing(model)[0]
    if n_crops > 1:
        transform = random_crop(transform)
    images = open_images(where, model, data_dir, split, labels=False, transform=transform)
    images = images.sample(n_images, seed)
    return repeat_with_crops(images, n_crops, seed) if n_crops > 1 else images


def random_crop(transform: Callable[[Image], Tensor]) -> Callable[[Image], Tensor]:
    """Prepend a random crop, drawn with PyTorch's generator, to a transform."""
    return partial(_crop, transform)  # a partial can be sent to worker processes


def _crop(transform: Callable[[Image], Tensor], photo: Image) -> Tensor:
    top, left, height, width = RandomResizedCrop.get_params(photo, list(SCALE), list(RATIO))
    return transform(photo.crop((left, top, left + width, top + height)))


def repeat_with_crops(images: Images, n_crops: int, seed: int) -> Images:
    """Repeat a data set with a random transform `n_crops` times."""
    crops = Crops(images.dataset, images.size, n_crops, seed)
    return replace(images, dataset=crops, size=len(crops))


@dataclass(frozen=True)
class Crops(Dataset[tuple[Tensor, int]]):
    """All photos in random order, once per crop; the same seed gives the same crops.

    So the images that `calibrate_` holds out are crops of any photo. Holding out whole photos would
    be stricter, but with few photos the fit loses more than the stricter check is worth.
    """

    photos: Dataset[tuple[Tensor, int]]
    n_photos: int
    n_crops: int
    seed: int

    def __len__(self) -> int:
        return self.n_photos * self.n_crops

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        photo, seed = self.draws[position].tolist()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.photos[photo]

    @cached_property
    def draws(self) -> Tensor:
        """The photo at each position and the seed of its crop: (n_photos * n_crops, 2)."""
        generator = torch.Generator().manual_seed(self.seed)
        rounds = [torch.randperm(self.n_photos, generator=generator) for _ in range(self.n_crops)]
        seeds = torch.randint(2**62, (len(self),), generator=generator)
        return torch.stack([torch.cat(rounds), seeds], 1)
