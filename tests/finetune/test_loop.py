"""The loop: what is evaluated is what is stored; stages, mixing, averages, and every failure."""

from __future__ import annotations

import copy
import csv
import math
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import legocompress as lego
from legocompress.data.images import preprocessing
from legocompress.errors import (
    DataError,
    LegoError,
    OutputError,
    OutputExistsError,
    TrainingError,
    UsageError,
)
from legocompress.finetune.loop import Epoch, finetune_, noted_original
from legocompress.finetune.trainer import Progress, Trainer
from legocompress.lego.module import lego_modules
from tests.support.tiny import compressed, dense, recipe, write_images

FROZEN = [{"epochs": 1, "indices": "frozen"}]
ONE = [{"epochs": 1, "rates": {"proxies": 100.0}}]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images.npz")


def train(
    model: nn.Module, images: Path, changes: dict[str, Any], **options: Any
) -> tuple[nn.Module, list[Epoch]]:
    found = recipe(**changes)
    epochs: list[Epoch] = []
    data = lego.open_training(model, found, str(images))
    finetune_(model, found, *data, on_epoch=epochs.append, **options)
    return model, epochs


def outputs(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model.eval()(torch.randn(4, 1, 16, 16, generator=generator))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize(("k", "coefficients"), [(1, True), (2, True), (1, False)])
def test_training_learns_and_stores_what_it_evaluated(
    k: int, coefficients: bool, images: Path, tmp_path: Path
) -> None:
    model = compressed(k=k, coefficients=coefficients, dtype="fp16")
    before = {name: m.index.clone() for name, m in lego_modules(model)}
    changes = {"stages": [{"epochs": 4, "rates": {"proxies": 300.0}}]}
    _, epochs = train(model, images, changes, out=tmp_path / "run")
    assert epochs[-1].top1 is not None
    assert epochs[-1].progress.loss < 0.8 * epochs[0].progress.loss
    assert any(not torch.equal(m.index, before[name]) for name, m in lego_modules(model))
    for name in ("last", "best"):
        again = lego.load(tmp_path / "run" / name)
        _, validation = lego.open_training(again, recipe(), str(images))
        found = lego.evaluate(again, validation.batches(5))
        expected = epochs[-1] if name == "last" else [e for e in epochs if e.best][-1]
        assert found.top1 == expected.top1
    assert torch.equal(outputs(lego.load(tmp_path / "run" / "last")), outputs(model))
    assert all(m.proxy is None for _, m in lego_modules(model))


def test_the_first_loss_is_that_of_the_converted_network(images: Path) -> None:
    model, twin = compressed(), compressed()
    found = recipe(augment={"crop": "none", "hflip": 0}, norm_stats="frozen", batch_size=40)
    train_images, validation = lego.open_training(model, found, str(images))
    seen: list[Progress] = []
    finetune_(model, found, train_images, validation, on_step=seen.append)
    shown = torch.stack(
        [preprocessing(twin)[0](i) for i, _ in train_images.dataset]  # type: ignore[attr-defined]
    )  # type: ignore[attr-defined]
    labels = torch.tensor([label for _, label in train_images.dataset])  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(twin(shown), labels)
    assert math.isclose(seen[0].loss, float(expected), rel_tol=1e-5)


def test_stages_freeze_indices_and_rates(images: Path, tmp_path: Path) -> None:
    model = compressed()
    filters = {n: p.clone() for n, p in model.named_parameters() if "lego_filters" in n}
    stem = model.conv1.weight.clone()  # type: ignore[union-attr, operator]
    stages = [
        {"epochs": 1, "rates": {"proxies": 1000.0, "rest": 0}},
        {"epochs": 1, "indices": "frozen", "rates": {"rest": 0}},
    ]
    _, epochs = train(model, images, {"stages": stages}, out=tmp_path / "run")
    assert epochs[0].progress.changed > 0
    assert epochs[1].progress.changed == 0
    assert torch.equal(model.conv1.weight, stem)  # type: ignore[union-attr, arg-type]
    assert all(not torch.equal(p, filters[n]) for n, p in model.named_parameters() if n in filters)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_that_trains_is_refused(images: Path) -> None:
    rates = dict.fromkeys(["filters", "coefficients", "norms", "rest"], 0)
    with pytest.raises(UsageError, match="nothing trains in epoch 1"):
        train(compressed(), images, {"stages": [{**FROZEN[0], "rates": rates}]})


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"ema": {"decay": 0.5, "warmup": False}},
        {"mixup": {"mixup": 0.2, "cutmix": 1.0}, "label_smoothing": 0.1},
        {"amp": "bf16"},
        {"clip": {"value": 0.1}},
        {"clip": {"value": 0.1, "mode": "agc"}},
        {"balance": 0.1},
        {"anchor": 0.1},
        {"norm_stats": "frozen"},
        {"channels_last": True},
        {"optimizer": {"name": "adamw", "lr": 0.001, "options": {"betas": [0.9, 0.95]}}},
        {"optimizer": {"name": "lamb", "lr": 0.001}},
        *[
            {"schedule": {"name": name, "warmup_epochs": 0.5}}
            for name in ("step", "multistep", "poly", "tanh", "constant")
        ],
        {"augment": {"auto_augment": "rand-m3", "re_prob": 0.3, "color_jitter": 0.1}},
        {"distill": {"labels": 0, "features": 0.5}},
        {"distill": {"logits": 0, "features": 1, "layers": ["layer2"]}},
    ],
    ids=str,
)
def test_every_ingredient_trains(changes: dict[str, Any], images: Path) -> None:
    model, epochs = train(compressed(), images, {"stages": ONE, **changes}, original=dense())
    assert outputs(model).isfinite().all()
    assert math.isfinite(epochs[0].progress.loss)


@pytest.mark.slow
def test_the_average_is_what_is_evaluated(images: Path) -> None:
    plain, _ = train(compressed(), images, {})
    averaged, _ = train(compressed(), images, {"ema": {"decay": 0.9, "warmup": False}})
    assert not torch.equal(outputs(plain), outputs(averaged))


@pytest.mark.slow
def test_accumulation_of_parts_is_one_batch(images: Path) -> None:
    """Norms by their running statistics, so that parts do not see each other."""
    frozen = {"norm_stats": "frozen"}
    whole, one = train(compressed(), images, frozen)
    parts, two = train(compressed(), images, {**frozen, "accumulate": 4})
    torch.testing.assert_close(outputs(whole), outputs(parts), rtol=1e-3, atol=1e-4)
    assert math.isclose(one[-1].progress.loss, two[-1].progress.loss, rel_tol=1e-5)


@pytest.mark.slow
def test_without_labels_the_original_teaches(tmp_path: Path) -> None:
    images = write_images(tmp_path / "x.npz", labels=False)
    changes = {"stages": [{"epochs": 4}], "distill": {"labels": 0, "logits": 1}}
    _, epochs = train(compressed(), images, changes, original=dense())
    assert epochs[-1].top1 is None
    assert epochs[-1].agreement is not None
    assert epochs[-1].progress.top1 is None
    assert epochs[-1].progress.loss < epochs[0].progress.loss
    with pytest.raises(UsageError, match=r"--set distill.labels=0"):
        train(compressed(), images, {})


@pytest.mark.slow
def test_labels_that_are_not_read_change_nothing(images: Path, tmp_path: Path) -> None:
    changes = {"stages": ONE, "distill": {"labels": 0, "logits": 1}}
    bare = write_images(tmp_path / "bare.npz", labels=False)
    a, _ = train(compressed(), images, changes, original=dense())
    b, _ = train(compressed(), bare, changes, original=dense())
    assert torch.equal(outputs(a), outputs(b))


def test_global_randomness_is_left_alone(images: Path) -> None:
    state = torch.get_rng_state()
    train(compressed(), images, {"stages": ONE})
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dense_network_trains_too(images: Path) -> None:
    model, epochs = train(dense(), images, {"stages": FROZEN})
    assert outputs(model).isfinite().all()
    assert epochs[0].progress.changed == 0


def test_the_files_of_a_run(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _, epochs = train(compressed(), images, {}, out=out, args={"checkpoint": "x"})
    assert {path.name for path in out.iterdir()} == {"args.yaml", "summary.csv", "state.pt", "best",
                                                     "last"}  # fmt: skip
    with (out / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert [float(row["eval_top1"]) for row in rows] == [e.top1 for e in epochs]
    assert [float(row["train_loss"]) for row in rows] == [e.progress.loss for e in epochs]
    noted = yaml.safe_load((out / "args.yaml").read_text())
    assert noted["checkpoint"] == "x"
    assert noted["recipe"] == recipe().model_dump(mode="json")
    again = lego.load(out / "best")
    assert lego.lego_state(again).conversion.recipe == noted["recipe"]  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_run_is_not_overwritten(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(compressed(), images, {"stages": ONE}, out=out)
    with pytest.raises(OutputExistsError, match="--resume"):
        train(compressed(), images, {"stages": ONE}, out=out)
    train(compressed(), images, {"stages": FROZEN}, out=out, force=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    for force in (False, True):
        with pytest.raises(OutputExistsError):
            train(compressed(), images, {"stages": ONE}, out=other, force=force)
    assert (other / "thesis.tex").exists()


def test_another_recipe_or_other_data_do_not_resume(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(compressed(), images, {"stages": ONE}, out=out)
    with pytest.raises(UsageError, match="batch_size: 8 then, 4 now"):
        train(compressed(), images, {"stages": ONE, "batch_size": 4}, out=out, resume=True)
    more = write_images(tmp_path / "more.npz", number=80)
    with pytest.raises(UsageError, match="the data has changed"):
        train(compressed(), more, {"stages": ONE}, out=out, resume=True)


def test_a_damaged_state_is_told(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(compressed(), images, {"stages": ONE}, out=out)
    for raw in (b"", b"x" * 99, (out / "state.pt").read_bytes()[:-500]):
        (out / "state.pt").write_bytes(raw)
        with pytest.raises(LegoError, match="damaged"):
            train(compressed(), images, {"stages": ONE}, out=out, resume=True)


def test_a_loss_that_is_no_number_stops(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {"optimizer": {"lr": 1e30}, "stages": [{"epochs": 3, "indices": "frozen"}]}
    with pytest.raises(TrainingError, match=r"what was saved before is still good.*optimizer.lr="):
        train(compressed(), images, changes, out=out)
    assert not (out / "last").exists()


@pytest.mark.slow
def test_the_last_good_checkpoint_stays(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    model = compressed()
    found = recipe()
    data = lego.open_training(model, found, str(images))

    def spoil(epoch: Epoch) -> None:
        with torch.no_grad():
            model.conv1.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]

    with pytest.raises(TrainingError, match="epoch 2"):
        finetune_(model, found, *data, out=out, on_epoch=spoil)
    assert outputs(lego.load(out / "last")).isfinite().all()
    resumed, _ = train(compressed(), images, {}, out=out, resume=True)
    whole, _ = train(compressed(), images, {})
    assert torch.equal(outputs(resumed), outputs(whole))


def test_weights_that_are_no_numbers_are_not_saved(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    model, found = compressed(), recipe(save_every=2)
    data = lego.open_training(model, found, str(images))
    states: list[bytes] = []

    def spoil(step: Progress) -> None:
        if step.update == 4:
            states.append((out / "state.pt").read_bytes())
            with torch.no_grad():
                model.conv1.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]

    with pytest.raises(TrainingError, match=r"conv1\.weight holds NaN"):
        finetune_(model, found, *data, out=out, on_step=spoil)
    assert (out / "state.pt").read_bytes() == states[0]


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Files of more than `limit` bytes cannot be written."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [2_000, 30_000])
def test_a_full_disk_leaves_the_checkpoint_before(limit: int, images: Path, tmp_path: Path) -> None:
    """The smaller limit stops the network's file, the larger one the state's."""
    out = tmp_path / "run"
    model, found = compressed(), recipe()
    data = lego.open_training(model, found, str(images))
    first: dict[str, bytes] = {}
    stack = full_disk(limit)

    def fill(epoch: Epoch) -> None:
        if not first:
            first.update({str(p): p.read_bytes() for p in out.rglob("*") if p.is_file()})
            stack.__enter__()

    try:
        with pytest.raises(OutputError, match="no space left"):
            finetune_(model, found, *data, out=out, on_epoch=fill)
    finally:
        stack.__exit__(None, None, None)
    state = str(out / "state.pt")
    assert Path(state).read_bytes() == first[state]
    lego.load(out / "best")
    resumed, _ = train(compressed(), images, {}, out=out, resume=True)
    whole, _ = train(compressed(), images, {})
    assert torch.equal(outputs(resumed), outputs(whole))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), ["--set accumulate=2", "amp=bf16", "no N"]),
        (MemoryError(), ["--set accumulate=2"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ["accumulate=2"]),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), ["--workers 0"]),
    ],
)
def test_what_to_lower_is_told(
    error: Exception, words: list[str], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, "_backward", fail)
    with pytest.raises(TrainingError) as caught:
        train(compressed(), images, {})
    for word in words:
        assert word in str(caught.value)


def test_other_errors_are_not_dressed_up(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "_backward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train(compressed(), images, {})


def test_labels_beyond_the_outputs(images: Path) -> None:
    model = lego.reset_classifier_(compressed(), 2)
    with pytest.raises(DataError, match=r"label 2.*2 outputs.*--num-classes"):
        train(model, images, {})


def test_nothing_to_validate_by(images: Path, tmp_path: Path) -> None:
    model, found = compressed(), recipe(stages=ONE)
    data = lego.open_training(model, found, str(images))
    bare = lego.open_images(str(write_images(tmp_path / "b.npz", labels=False)), model)
    with pytest.raises(UsageError, match="nothing to tell a good epoch by"):
        finetune_(model, found, data[0], bare)


def test_distilling_needs_the_original(images: Path) -> None:
    with pytest.raises(UsageError, match="not given"):
        train(compressed(), images, {"distill": {}})
    with pytest.raises(UsageError, match="--original"):
        noted_original(compressed())
    changes = {"distill": {"features": 1, "layers": ["layer9"]}}
    with pytest.raises(UsageError, match="has no module 'layer9'"):
        train(compressed(), images, changes, original=dense())
    other = lego.reset_classifier_(dense(), 7)
    with pytest.raises(UsageError, match=r"distill\.logits=0"):
        train(compressed(), images, {"distill": {}}, original=other)


def test_a_checkpoint_names_its_original(tmp_path: Path) -> None:
    teacher = dense()
    model = copy.deepcopy(teacher)
    lego.convert_(model, lego.plan(model, lego.LegoSpec(allow_expansion=True)))
    with pytest.raises(UsageError, match="random, seed 0"):
        noted_original(model)
