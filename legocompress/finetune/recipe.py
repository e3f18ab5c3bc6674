"""The schema of a fine-tuning recipe: frozen values, validated when they are created."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(_Block):
    """Which images to train and validate on, under the `--data-dir` that the user gives.

    `dataset` is a timm name (`torch/cifar10`, `hfds/...`, `wds/...`). Without one, the kind of data
    is recognised from the content of the data directory.

    `holdout` replaces the validation split by a hold-out set of the training images: a number of
    images, or, below 1, a fraction of them. `holdout_from` draws it at random or takes it from the
    end.
    """

    dataset: str | None = None
    train: str = "train"
    validation: str = "validation"
    holdout: float = Field(default=0.0, ge=0)
    holdout_from: Literal["random", "end"] = "random"


class Augment(_Block):
    """Augmentation of the training images; names and meanings are timm's.

    `crop` is one of
    - `resized`: timm's random resized crop by `scale` and `ratio`;
    - `shift`: resize, pad by `padding` pixels, crop at random;
    - `none`: resize only.
    """

    crop: Literal["resized", "shift", "none"] = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    padding: int = Field(default=4, ge=0)
    hflip: float = Field(default=0.5, ge=0, le=1)
    vflip: float = Field(default=0.0, ge=0, le=1)
    color_jitter: float | None = Field(default=None, ge=0)
    auto_augment: str | None = None
    re_prob: float = Field(default=0.0, ge=0, le=1)


class Optimizer(_Block):
    """A timm optimiser by name; `options` are passed to it unchanged."""

    name: str = "sgd"
    lr: float = Field(gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    options: dict[str, Any] = {}


class Schedule(_Block):
    """A timm learning rate schedule over all stages together, stepped at every update."""

    name: Literal["cosine", "tanh", "step", "multistep", "poly", "constant"] = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_lr: float = Field(default=0.0, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    decay_epochs: float = Field(default=30.0, gt=0)
    decay_milestones: tuple[float, ...] = (30, 60, 80)
    decay_rate: float = Field(default=0.1, gt=0, le=1)


class Rates(_Block):
    """Multiples of the learning rate, per kind of parameter; a kind at 0 does not train.

    `norms` are the weights and biases of normalisation layers; `rest` is the stem, the classifier
    and whatever else stayed dense, with every other bias.
    """

    filters: float = Field(default=1.0, ge=0)
    proxies: float = Field(default=1.0, ge=0)
    coefficients: float = Field(default=1.0, ge=0)
    norms: float = Field(default=1.0, ge=0)
    rest: float = Field(default=1.0, ge=0)


class Stage(_Block):
    """Consecutive epochs with the same rates; with `indices: frozen` there is no proxy N."""

    epochs: int = Field(ge=1)
    indices: Literal["trained", "frozen"] = "trained"
    rates: Rates = Rates()


class Ema(_Block):
    """A moving average of the network (timm's ModelEmaV3), which is evaluated and stored."""

    decay: float = Field(default=0.9998, gt=0, lt=1)
    warmup: bool = True


class Mixup(_Block):
    """timm's Mixup of pairs of images; `mixup` and `cutmix` are alphas, and 0 switches one off."""

    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    prob: float = Field(default=1.0, ge=0, le=1)
    switch_prob: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _check_something_mixes(self) -> Mixup:
        if not self.mixup and not self.cutmix:
            raise ValueError("mixup and cutmix are both 0: drop the block")
        return self


class Clip(_Block):
    """timm's gradient clipping; the gradients of proxies are not clipped."""

    value: float = Field(gt=0)
    mode: Literal["norm", "value", "agc"] = "norm"


class Distill(_Block):
    """Distillation of the original network: the weight of each term of the loss.

        loss = labels * cross-entropy with the labels
             + logits * KL divergence from the original's outputs, at `temperature`
             + features * relative squared error of the outputs of `layers`

    With `labels` 0, no labels are read. `layers` are module names; by default they are the stages
    that timm's feature_info names.
    """

    labels: float = Field(default=0.1, ge=0)
    logits: float = Field(default=0.9, ge=0)
    temperature: float = Field(default=4.0, gt=0)
    features: float = Field(default=0.0, ge=0)
    layers: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_something_is_distilled(self) -> Distill:
        if not self.logits and not self.features:
            raise ValueError("logits and features are both 0: drop the block")
        return self


class Recipe(_Block):
    """Everything that decides how a network is fine-tuned, except where the data lies.

    - `batch_size`: images per update, over all processes and all `accumulate` parts together.
    - `norm_stats`: BatchNorm normalises by the statistics of each part (`batch`), of that part on
      all processes (`sync`, GPUs only), or by its running statistics, which then stay as they are
      (`frozen`).
    - `anchor`: weight of the pull of N towards the value it would start from, given the current
      filters, indices and coefficients. Without it, N adds up the gradient of every step.
    - `balance`: weight of the term, from the authors' released code, that evens out how often each
      Lego filter is used.
    - `save_every`: updates between saved states; 0 saves at the end of epochs only.
    """

    description: str = ""
    seed: int = Field(default=0, ge=0)
    data: Data = Data()
    augment: Augment = Augment()
    batch_size: int = Field(default=128, ge=1)
    accumulate: int = Field(default=1, ge=1)
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    stages: tuple[Stage, ...] = Field(min_length=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: Mixup | None = None
    distill: Distill | None = None
    ema: Ema | None = None
    clip: Clip | None = None
    anchor: float = Field(default=0.0, ge=0)
    balance: float = Field(default=0.0, ge=0)
    norm_stats: Literal["batch", "sync", "frozen"] = "batch"
    amp: Literal["off", "bf16", "fp16"] = "off"
    channels_last: bool = False
    save_every: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_consistency(self) -> Recipe:
        indices = [stage.indices for stage in self.stages]
        if ("frozen", "trained") in pairwise(indices):
            raise ValueError("stages: indices that are frozen stay so; put frozen stages last")
        for number, stage in enumerate(self.stages):
            if stage.indices == "trained" and stage.rates.proxies == 0:
                raise ValueError(
                    f"stages.{number}: rates.proxies 0 is 'indices: frozen', which needs no memory"
                )
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size is not a multiple of accumulate")
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(f"schedule.warmup_epochs leaves nothing of {self.epochs} epochs")
        if self.distill is not None and self.distill.labels == 0 and self.label_smoothing:
            raise ValueError("label_smoothing with distill.labels 0: there are no labels to smooth")
        return self

    @property
    def epochs(self) -> int:
        """Number of epochs of all stages together."""
        return sum(stage.epochs for stage in self.stages)

    @property
    def uses_labels(self) -> bool:
        """Whether the loss reads labels."""
        return self.distill is None or self.distill.labels > 0

    def stage_of(self, epoch: int) -> Stage:
        """The stage of an epoch, counted from 0; beyond the end, the last stage."""
        for stage in self.stages:
            if epoch < stage.epochs:
                return stage
            epoch -= stage.epochs
        return self.stages[-1]
