"""A callback for Lightning that trains the indices of a compressed network in the user's own loop.

Importing this module needs Lightning (`lightning` or `pytorch_lightning`); the package itself does
not import it.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import Tensor

from legocompress.errors import UsageError
from legocompress.finetune.optimize import add_anchor_, add_balance_
from legocompress.finetune.progress import copy_indices, count_changed_entries
from legocompress.lego.module import lego_modules
from legocompress.lego.surgery import freeze_indices_, synchronise_indices_, train_indices_

LIBRARIES = ("lightning.pytorch", "pytorch_lightning")


def _import_lightning() -> Any:
    """Import the library whose Trainer the user has; the two have callbacks of their own.

    Raises:
        UsageError: neither is installed.
    """
    for name in sorted(LIBRARIES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UsageError("the callback needs Lightning: pip install 'legocompress[lightning]'")


_library = _import_lightning()


class TrainIndices(_library.Callback):  # type: ignore[misc, name-defined]
    """Gives every Lego layer a proxy N for the time of a fit, so that its index trains.

    The proxies exist before `configure_optimizers` is called, so the module's parameters include
    them. After the fit they are removed, and each index keeps what N chose last. During a fit, the
    number of index entries that differ from the epoch's start is logged as `index_changes`.

    Args:
        anchor: weight of the pull of N towards the value it would start from, as in a recipe.
        balance: weight of the term that evens out how often each Lego filter is used.

    Raises:
        UsageError: the module has no Lego layers.
        ConversionError: a slot of a layer uses one Lego filter twice.
    """

    def __init__(self, anchor: float = 0.1, balance: float = 0.0):
        self.anchor, self.balance = anchor, balance
        self.start_indices: dict[str, Tensor] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Add the proxies, before the optimisers are made."""
        if stage != "fit":
            return
        if not any(True for _ in lego_modules(pl_module)):
            raise UsageError(
                "TrainIndices found no Lego layer in this module; convert its network first, with "
                "legocompress.convert_ or legocompress.load"
            )
        train_indices_(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the optimisers train the proxies.

        Raises:
            UsageError: an optimiser was made of other parameters.
        """
        trained = {
            id(parameter)
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for name, module in lego_modules(pl_module):
            if module.proxy is not None and id(module.proxy) not in trained:
                raise UsageError(
                    f"no optimizer trains the proxy of {name!r}; give configure_optimizers all "
                    "parameters of the module when it is called, not when the module is created"
                )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Note the indices, to count what changes."""
        self.start_indices = copy_indices(pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Add the gradients of the anchor and balance terms to those of the proxies."""
        if self.anchor:
            add_anchor_(pl_module, self.anchor)
        if self.balance:
            add_balance_(pl_module, self.balance)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **values: Any) -> None:
        """Bring the indices up to date with the proxies, for whoever saves or reads them now."""
        synchronise_indices_(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log how many index entries the epoch has changed."""
        n_changed = count_changed_entries(pl_module, self.start_indices)
        pl_module.log("index_changes", float(n_changed))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove the proxies; each index keeps what N chose last."""
        freeze_indices_(pl_module)
