"""What a calibration used and did, as the checkpoint keeps it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LayerRepair(_Record):
    """Relative error of one layer's output, on held-out images, against the original's output.

    The error is ||y - y'|| / ||y|| without bias, each network on its own inputs, before and after
    the layer's own repair; None with a note where the layer was left as it was.
    """

    name: str
    before: float | None = None
    after: float | None = None
    note: str | None = None


class LabelledCheck(_Record):
    """Top-1 accuracy in percent on labelled images, which no step of the calibration read."""

    images: int
    original: float
    before: float
    after: float


class Calibration(_Record):
    """What a network was calibrated with, and what that did.

    Errors are relative, ||y - y'|| / ||y|| of the network's outputs; agreement is the percentage of
    images with the same first class as the original, None for outputs other than (N, classes).
    Both are measured on the images that the calibration held out.

    Attributes:
        images: how many, held-out ones included.
        sha256: over the preprocessed images.
        synthetic: they were made from norm statistics; there were no photos.
        seed: of all that is random.
        epochs: of tuning all layers together; 0 where that was left out or did not help.
        norms: whether norm statistics were re-estimated.
        crops: how many of the images are random crops of one photo; 1 for whole photos.
        accuracy: before and after, where labelled images were given to tell it.
    """

    images: int
    sha256: str
    synthetic: bool
    seed: int
    epochs: int
    norms: bool
    error_before: float
    error_after: float
    agreement_before: float | None
    agreement_after: float | None
    layers: list[LayerRepair]
    crops: int = 1
    accuracy: LabelledCheck | None = None
