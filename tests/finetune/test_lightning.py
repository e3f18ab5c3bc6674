"""The callback keeps the indices in step with the user's own Lightning loop."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import legocompress as lego
from legocompress.errors import UsageError
from legocompress.finetune import group_parameters
from legocompress.finetune.optimize import add_anchor_
from tests.support.tiny import compressed, dense

MODULE = "legocompress.finetune.lightning"


@pytest.fixture
def callback_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the callback, with a base class that does nothing in place of Lightning's."""
    fake: Any = ModuleType("lightning.pytorch")
    fake.Callback = object
    monkeypatch.setitem(sys.modules, "lightning.pytorch", fake)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE)


class Logged(nn.Module):
    """A module that trains `net`, and stores what is logged, as a LightningModule does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = compressed()
        self.logged: dict[str, float] = {}

    def log(self, name: str, value: float) -> None:
        self.logged[name] = value

    def loss(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(6, 1, 16, 16, generator=generator)
        return F.cross_entropy(self.net(images), torch.arange(6) % 3)


def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    groups = group_parameters(module)
    for group in groups:
        group["lr"] = 30.0 if group["kind"] == "proxies" else 0.0
    return torch.optim.SGD(groups, lr=0.0)


def test_one_epoch_in_the_order_of_a_trainer(callback_module: Any) -> None:
    module, callback = Logged().train(), callback_module.TrainIndices(anchor=0.0)
    before = {name: m.index.clone() for name, m in lego.lego_modules(module)}
    callback.setup(None, module, "fit")
    assert all(m.proxy is not None for _, m in lego.lego_modules(module))
    optimizer = make_optimizer(module)
    trainer = SimpleNamespace(optimizers=[optimizer])
    callback.on_fit_start(trainer, module)
    callback.on_train_epoch_start(trainer, module)
    for number in range(3):
        optimizer.zero_grad()
        module.loss().backward()
        callback.on_before_optimizer_step(trainer, module, optimizer)
        optimizer.step()
        callback.on_train_batch_end(trainer, module, None, None, number)
    for _, m in lego.lego_modules(module):
        top = m.proxy.topk(m.lego_shape.n_terms, dim=2).indices
        assert torch.equal(m.index.sort(2).values, top.sort(2).values)
    callback.on_train_epoch_end(trainer, module)
    callback.on_fit_end(trainer, module)
    assert all(m.proxy is None for _, m in lego.lego_modules(module))
    changed = sum(int((m.index != before[name]).sum()) for name, m in lego.lego_modules(module))
    assert module.logged["index_changes"] == changed > 0


def test_the_anchor_is_added_to_the_gradients(callback_module: Any) -> None:
    module, callback = Logged().train(), callback_module.TrainIndices(anchor=0.5)
    callback.setup(None, module, "fit")
    with torch.no_grad():
        for _, m in lego.lego_modules(module):
            m.proxy.mul_(1.5)
    module.loss().backward()
    proxies = {name: m.proxy for name, m in lego.lego_modules(module)}
    plain = {name: proxy.grad.clone() for name, proxy in proxies.items()}
    callback.on_before_optimizer_step(None, module, None)
    anchored = {name: proxy.grad.clone() for name, proxy in proxies.items()}
    for name, proxy in proxies.items():
        proxy.grad = plain[name].clone()
    add_anchor_(module, 0.5)
    assert any(not torch.equal(anchored[name], plain[name]) for name in plain)
    assert all(torch.equal(anchored[name], proxies[name].grad) for name in plain)


def test_other_stages_change_nothing(callback_module: Any) -> None:
    module = Logged()
    callback_module.TrainIndices().setup(None, module, "validate")
    assert all(m.proxy is None for _, m in lego.lego_modules(module))


def test_what_cannot_work_is_said_before_training(callback_module: Any) -> None:
    callback = callback_module.TrainIndices()
    with pytest.raises(UsageError, match="no Lego layer in this module"):
        callback.setup(None, dense(), "fit")
    module = Logged()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)  # made before there are proxies
    callback.setup(None, module, "fit")
    with pytest.raises(UsageError, match=r"no optimizer trains the proxy of 'net\."):
        callback.on_fit_start(SimpleNamespace(optimizers=[optimizer]), module)


def test_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(UsageError, match=r"legocompress\[lightning\]"):
        importlib.import_module(MODULE)


@pytest.mark.slow
def test_a_trainer_of_lightning(tmp_path: Path) -> None:
    library: Any = pytest.importorskip("lightning.pytorch")
    TrainIndices = importlib.import_module(MODULE).TrainIndices

    class Module(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = compressed()

        def training_step(self, batch: Any, number: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.net(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make_optimizer(self)

    module = Module()
    before = [m.index.clone() for _, m in lego.lego_modules(module)]
    data = [(torch.randn(6, 1, 16, 16), torch.arange(6) % 3) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = library.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, default_root_dir=tmp_path,
            callbacks=[TrainIndices(anchor=0.0)],
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    changed = sum(
        int((m.index != start).sum())
        for (_, m), start in zip(lego.lego_modules(module), before, strict=True)
    )
    assert trainer.callback_metrics["index_changes"] == changed > 0
    assert all(m.proxy is None for _, m in lego.lego_modules(module))
