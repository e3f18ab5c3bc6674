"""The record of a calibration, as the checkpoint stores it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LayerRepair(_Record):
    """The error of the output of one layer on held-out images, before and after its repair.

    The error is ||y - y'|| / ||y|| without bias, where y comes from the original network and y'
    from the converted one, each on its own inputs. It is None, with a note, where the layer was
    skipped.
    """

    name: str
    before: float | None = None
    after: float | None = None
    note: str | None = None


class LabelledCheck(_Record):
    """Top-1 accuracy in percent on labelled images, which no step of the calibration reads."""

    images: int
    original: float
    before: float
    after: float


class Calibration(_Record):
    """What a network was calibrated with, and the effect.

    Errors are relative errors ||y - y'|| / ||y|| of the outputs. Agreement is the percentage of
    images with the same first class as the original. Logit errors are relative errors of the logits
    minus their mean over the classes, and divergences are the mean of KL(original || compressed)
    in nats; agreement and these two are None for outputs other than (N, classes), and in records of
    earlier versions. All are measured on the held-out images.

    Attributes:
        images: number of images, held-out images included.
        sha256: over the preprocessed images.
        synthetic: the images were made from norm statistics instead of photos.
        seed: of everything random.
        epochs: epochs of joint tuning; 0 where it was left out or did not help.
        norms: whether norm statistics were re-estimated.
        crops: random crops per photo; 1 for whole photos.
        accuracy: before and after, where labelled images were given.
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
    logit_error_before: float | None = None
    logit_error_after: float | None = None
    divergence_before: float | None = None
    divergence_after: float | None = None
