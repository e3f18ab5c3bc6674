"""A fine-tuning recipe: YAML in, validated frozen values out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from legocompress.errors import RecipeError

MAX_RECIPE_BYTES = 2**20


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(_Block):
    """What to train on, under the `--data-dir` that the user gives.

    `dataset` is a timm name (`torch/cifar10`, `hfds/...`, `wds/...`); without one the data
    directory itself says what it is. `holdout` keeps that many of the training images (below 1:
    that part of them) for validation in place of a validation split: drawn at random, or taken from
    the end.
    """

    dataset: str | None = None
    train: str = "train"
    validation: str = "validation"
    holdout: float = Field(default=0.0, ge=0)
    holdout_from: Literal["random", "end"] = "random"


class Augment(_Block):
    """How training images differ from epoch to epoch; names and meanings are timm's.

    `crop` is timm's random resized crop by `scale` and `ratio`, or `shift`: resize, pad by
    `padding` pixels, crop at random; or `none`.
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
    """An optimiser of timm's by name; `options` go to it as they are."""

    name: str = "sgd"
    lr: float = Field(gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    options: dict[str, Any] = {}


class Schedule(_Block):
    """A learning rate schedule of timm's over all stages, stepped at every update."""

    name: Literal["cosine", "tanh", "step", "multistep", "poly", "constant"] = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_lr: float = Field(default=0.0, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    decay_epochs: float = Field(default=30.0, gt=0)
    decay_milestones: tuple[float, ...] = (30, 60, 80)
    decay_rate: float = Field(default=0.1, gt=0, le=1)


class Rates(_Block):
    """Multiples of the learning rate by kind of parameter; 0 leaves that kind as it is.

    `norms` are the weights and biases of normalisation layers; `rest` is the stem, the classifier
    and whatever else stayed dense, with every other bias.
    """

    filters: float = Field(default=1.0, ge=0)
    proxies: float = Field(default=1.0, ge=0)
    coefficients: float = Field(default=1.0, ge=0)
    norms: float = Field(default=1.0, ge=0)
    rest: float = Field(default=1.0, ge=0)


class Stage(_Block):
    """Epochs in which the same things train; `indices: frozen` needs no proxy N."""

    epochs: int = Field(ge=1)
    indices: Literal["trained", "frozen"] = "trained"
    rates: Rates = Rates()


class Ema(_Block):
    """A moving average of the network (timm's ModelEmaV3), which is then what is evaluated."""

    decay: float = Field(default=0.9998, gt=0, lt=1)
    warmup: bool = True


class Mixup(_Block):
    """Images mixed in pairs, by timm's Mixup; an alpha of 0 switches that kind off."""

    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    prob: float = Field(default=1.0, ge=0, le=1)
    switch_prob: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _something(self) -> Mixup:
        if not self.mixup and not self.cutmix:
            raise ValueError("mixup and cutmix are both 0: drop the block")
        return self


class Clip(_Block):
    """Gradient clipping as timm does it; the proxies' gradients are left alone."""

    value: float = Field(gt=0)
    mode: Literal["norm", "value", "agc"] = "norm"


class Distill(_Block):
    """What the original network teaches: weights of the terms whose sum is the loss.

    `labels`: cross-entropy with the labels; 0 trains without any. `logits`: KL divergence from the
    original's outputs at `temperature`. `features`: relative squared error of the outputs of
    `layers` (module names), by default the stages that timm's feature_info names.
    """

    labels: float = Field(default=0.1, ge=0)
    logits: float = Field(default=0.9, ge=0)
    temperature: float = Field(default=4.0, gt=0)
    features: float = Field(default=0.0, ge=0)
    layers: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _something(self) -> Distill:
        if not self.logits and not self.features:
            raise ValueError("logits and features are both 0: drop the block")
        return self


class Recipe(_Block):
    """Everything that decides how a network is fine-tuned, but for where the data lies.

    `batch_size` counts the images of one update, over all processes and `accumulate` parts.
    `norm_stats`: BatchNorm uses each part's statistics, those of all processes (`sync`, GPUs only),
    or its running ones, which then stay. `anchor` is how strongly N is drawn to where it would
    start from now; without it N piles up what the gradient says at every step. `balance` weighs the
    term of the authors' released code that evens out how often each Lego filter is used.
    `save_every` counts updates between saved states; 0 saves at the end of epochs only.
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
    def _consistent(self) -> Recipe:
        indices = [stage.indices for stage in self.stages]
        if "trained" in indices[indices.index("frozen") if "frozen" in indices else len(indices) :]:
            raise ValueError("stages: indices that are frozen stay so; put frozen stages last")
        for number, stage in enumerate(self.stages):
            if stage.indices == "trained" and stage.rates.proxies == 0:
                raise ValueError(
                    f"stages.{number}: rates.proxies 0 is 'indices: frozen', which needs no memory"
                )
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size is no multiple of accumulate")
        if self.schedule.warmup_epochs >= self.epochs:
            raise ValueError(f"schedule.warmup_epochs leaves nothing of {self.epochs} epochs")
        if self.distill is not None and self.distill.labels == 0 and self.label_smoothing:
            raise ValueError("label_smoothing with distill.labels 0: there are no labels to smooth")
        return self

    @property
    def epochs(self) -> int:
        """Epochs of all stages together."""
        return sum(stage.epochs for stage in self.stages)

    @property
    def uses_labels(self) -> bool:
        """Whether the loss reads labels."""
        return self.distill is None or self.distill.labels > 0

    def stage_of(self, epoch: int) -> Stage:
        """The stage that an epoch, counted from 0, belongs to."""
        for stage in self.stages:
            if epoch < stage.epochs:
                return stage
            epoch -= stage.epochs
        return self.stages[-1]


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        path.name.removesuffix(".yaml")
        for path in files("legocompress.recipes").iterdir()
        if path.name.endswith(".yaml")
    )


def load_recipe(name: str, changes: Iterable[str] = ()) -> Recipe:
    """Read a recipe by the name of a shipped one or from a YAML file.

    Args:
        name: such as `fashion-mnist`, or a path that ends in .yaml or .yml.
        changes: `dotted.path=value` each, the value as YAML: `optimizer.lr=0.01`,
            `stages.0.epochs=2`, `ema=null`.

    Raises:
        RecipeError: there is none, or it says something that it may not; every fault is told.
    """
    values = _parse(name, _text(name))
    for change in changes:
        _change(values, change)
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise RecipeError(f"recipe {name!r}: {_explain(error)}") from None


def _text(name: str) -> str:
    if not name.endswith((".yaml", ".yml")):
        if name in shipped_recipes():
            return (files("legocompress.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
        raise RecipeError(
            f"no recipe is called {name!r}; shipped are {', '.join(shipped_recipes())}, or give "
            "the path of a .yaml file"
        )
    try:
        if Path(name).stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"recipe {name!r} is larger than {MAX_RECIPE_BYTES:,} bytes")
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {name!r} cannot be read: {error}") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, of which plain YAML keeps the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"key {twice[0]!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def _parse(name: str, text: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        told = " ".join(str(error).split())[:300]
        raise RecipeError(f"recipe {name!r} is no YAML: {told}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"recipe {name!r} is no YAML mapping of settings")
    return values


def _change(values: dict[str, Any], change: str) -> None:
    """Set one `dotted.path=value` in nested mappings and lists."""
    path, equals, text = change.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"--set {change!r} is not of the form dotted.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {change!r}: the value is no YAML") from None
    *parents, leaf = path.strip().split(".")
    place: Any = values
    for number, part in enumerate([*parents, leaf]):
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise RecipeError(
                    f"--set {change!r}: {'.'.join(parents[:number])} has entries 0 to "
                    f"{len(place) - 1}, not {part!r}"
                )
            key: Any = int(part)
        elif isinstance(place, dict):
            key = part
        else:
            raise RecipeError(f"--set {change!r}: {'.'.join(parents[:number])} has no parts")
        if number == len(parents):
            place[key] = value
        else:
            if isinstance(place, dict) and place.get(key) is None:
                place[key] = {}
            place = place[key]


def _explain(error: ValidationError) -> str:
    faults = []
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "too_short" and fault["input"]:
            continue  # only because of faulty entries, which are told themselves
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            known = _allowed(fault["loc"])
            near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(known)}"
            message = f"unknown key; {hint}"
        elif fault["type"] == "missing":
            message = "is needed and not given"
        elif path and not isinstance(fault["input"], (dict, list)):
            message = f"{fault['input']!r}: {message[0].lower()}{message[1:]}"
        faults.append(f"{path}: {message}" if path else message)
    count = f"{len(faults)} faults: " if len(faults) > 1 else ""
    return count + "; ".join(faults)


def _allowed(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the block that a faulty key stands in."""
    blocks: dict[str, type[BaseModel]] = {
        "data": Data, "augment": Augment, "optimizer": Optimizer, "schedule": Schedule,
        "stages": Stage, "rates": Rates, "ema": Ema, "mixup": Mixup, "clip": Clip,
        "distill": Distill,
    }  # fmt: skip
    named = [part for part in location[:-1] if isinstance(part, str)]
    return sorted((blocks[named[-1]] if named else Recipe).model_fields)
