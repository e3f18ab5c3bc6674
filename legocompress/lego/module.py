"""The Lego module: the conv or Linear that it replaces, with a weight made of Lego filters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

from legocompress.errors import ConversionError, DenseOnlyError
from legocompress.lego.algebra import assemble, split_transform_merge
from legocompress.lego.plain import has_replaced_method, is_plain_class, is_plain_parameter
from legocompress.lego.proxy import assemble_through, choose_terms, start_proxy
from legocompress.lego.shape import UnitShape
from legocompress.lego.unit import LegoUnit
from legocompress.lego.watch import (
    WeightWatch,
    can_watch,
    is_running_own_code,
    is_traced,
    running_own_code,
)
from legocompress.spec import FilterDtype, StorageDtype

Route = Literal["assemble", "reference"]
ModelT = TypeVar("ModelT", bound=nn.Module)


class LegoModule(nn.Module):
    """The mixin that turns a conv or Linear class into a Lego class.

    Parameters: `lego_filters` (m, q, kh, kw) and `coefficients` (o, n, k; None in the binary form).
    Buffer: `index` (o, n, k, int64). Every read of `weight` assembles the dense weight from them.
    Modules that share a bank hold one and the same parameter `lego_filters`.
    While the index trains there is also a parameter `proxy` (o, n, m), and the index is its top k.
    """

    lego_shape: UnitShape
    lego_filters: nn.Parameter
    index: Tensor
    coefficients: nn.Parameter | None
    proxy: nn.Parameter | None
    frozen_weight: Tensor | None
    storage_dtype: FilterDtype
    coefficients_dtype: StorageDtype
    weight_error: float | None
    bias: nn.Parameter | None
    _route: Route
    _channels_last: bool
    _watch: WeightWatch | None

    @property
    def lego_unit(self) -> LegoUnit:
        """The live filters, index and coefficients."""
        return LegoUnit(self.lego_filters, self.index, self.coefficients)

    @property
    def weight(self) -> Tensor:
        """The dense weight, in the layout of the replaced class; read-only.

        Raises:
            DenseOnlyError: the weight that an earlier read gave was changed in place.
        """
        if is_traced():
            return self._assemble() if self.frozen_weight is None else self.frozen_weight
        self.refuse_lost_write()
        weight = self._assemble() if self.frozen_weight is None else self.frozen_weight
        if can_watch(weight) and not is_running_own_code():
            self._watch = WeightWatch(weight, is_cached=weight is self.frozen_weight)
        return weight

    def _assemble(self) -> Tensor:
        self.synchronise_index()
        if self.proxy is None:
            filters = assemble(self.lego_shape, self.lego_unit)
        else:
            filters = assemble_through(self.lego_shape, self.lego_unit, self.proxy)
        if isinstance(self, nn.Linear):
            return filters.flatten(1)
        if self._channels_last:
            return filters.contiguous(memory_format=torch.channels_last)
        return filters

    @property
    def watch(self) -> WeightWatch | None:
        """Watches the weight that was read last; None if none was, or if it is not cached now."""
        watch = self.__dict__.get("_watch")
        return watch if watch is not None and watch.is_of(self.frozen_weight) else None

    def refuse_lost_write(self) -> None:
        """Raise DenseOnlyError, once, if somebody wrote to the assembled weight."""
        watch = self.watch
        if watch is not None and watch.is_written():
            self._watch = self.frozen_weight = None
            raise DenseOnlyError(
                f"the weight of this {type(self).__name__} was changed in place. It is assembled "
                "from Lego filters, so the change is lost; call legocompress.to_dense(model) "
                "first, or change lego_filters"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise DenseOnlyError(
                f"the weight of this {type(self).__name__} is assembled from Lego filters and "
                "cannot be set; call legocompress.to_dense(model) first, or change lego_filters"
            )
        super().__setattr__(name, value)

    @property
    def route(self) -> Route:
        """How the layer computes: 'assemble' the dense weight, or the 'reference' merge."""
        return self._route

    @route.setter
    def route(self, route: Route) -> None:
        if route not in self.routes():
            raise ConversionError(
                f"{type(self).__name__} has no route {route!r}; it has {', '.join(self.routes())}"
            )
        self._route = route

    def routes(self) -> tuple[Route, ...]:
        """The routes of this layer; one with a computation of its own has 'assemble' alone."""
        return ("assemble", "reference") if computes_plainly(self) else ("assemble",)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer by its route."""
        if self._route == "reference":
            if not is_traced():
                self.refuse_lost_write()
            return self._reference(input)
        if is_traced():
            return super().forward(input, *args, **kwargs)  # type: ignore[misc,no-any-return]
        with running_own_code():
            return super().forward(input, *args, **kwargs)  # type: ignore[misc,no-any-return]

    def _reference(self, x: Tensor) -> Tensor:
        if isinstance(self, nn.Linear):
            pixels = x.reshape(-1, x.shape[-1], 1, 1)
            y = split_transform_merge(self.lego_shape, self.lego_unit, pixels, self.bias)
            return y.reshape(*x.shape[:-1], self.lego_shape.n_out)
        assert isinstance(self, nn.Conv2d)
        padding: Any = self.padding
        if isinstance(self, Conv2dSame):
            x, padding = pad_same(x, self.lego_shape.kernel, self.stride, self.dilation), (0, 0)
        elif self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        # A traced input does not tell its number of axes; assume a batch.
        batched = isinstance(x, torch.fx.Proxy) or x.dim() == 4
        y = split_transform_merge(
            self.lego_shape,
            self.lego_unit,
            x if batched else x[None],
            self.bias,
            self.stride,
            padding,
            self.dilation,
        )
        return y if batched else y[0]

    def train_index(self) -> None:
        """Add a proxy N that chooses what the index holds now, so that the index can train.

        Raises:
            ConversionError: a slot uses one Lego filter twice, which a top k cannot express.
        """
        if self.lego_shape.n_lego > self.lego_shape.n_terms and self.proxy is None:
            ordered = self.index.sort(2).values
            if (ordered[:, :, 1:] == ordered[:, :, :-1]).any():
                raise ConversionError(
                    f"a slot of this {type(self).__name__} names one Lego filter twice, so its "
                    "index cannot learn; fine-tune with 'indices: frozen', or convert with k=1"
                )
            with torch.no_grad():
                self.proxy = nn.Parameter(start_proxy(self.lego_shape, self.lego_unit))

    @torch.no_grad()
    def synchronise_index(self) -> None:
        """Set the index to the top k of N, and compute the coefficients of terms that are new."""
        if self.proxy is None:
            return
        index, coefficients = choose_terms(self.lego_shape, self.lego_unit, self.proxy)
        self.index.copy_(index)
        if self.coefficients is not None and coefficients is not None:
            self.coefficients.copy_(coefficients)

    def freeze_index(self) -> None:
        """Remove N; the index keeps what N chose last."""
        self.synchronise_index()
        self.proxy = None

    def freeze(self) -> None:
        """Assemble the weight once and cache it; `train()` and loading a state drop the cache."""
        self.refuse_lost_write()
        self._watch = None
        self.frozen_weight = self._assemble().detach()

    def train(self, mode: bool = True) -> LegoModule:
        """Set the training flag; training drops a cached weight, so that the filters can learn."""
        if mode and self.frozen_weight is not None:
            self.refuse_lost_write()
            self.frozen_weight = self._watch = None
        super().train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LegoModule:
        self.refuse_lost_write()
        frozen, self.frozen_weight = self.frozen_weight is not None, None
        # Filters of one channel look the same in both layouts, so ask `fn` with a sample.
        layout = torch.channels_last if self._channels_last else torch.contiguous_format
        sample = fn(self.lego_filters.detach().new_empty(2, 2, 2, 2).to(memory_format=layout))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._channels_last = is_channels_last(sample)
        if frozen:
            self.freeze()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.frozen_weight = None
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class exists at run time only, so a copy is rebuilt from its base class.
        return _blank, (replaced_class(self),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watch": None}  # a copy has counters of its own

    def __prepare_scriptable__(self) -> None:
        """Refuse `torch.jit.script`, which calls this before it compiles the module.

        Raises:
            DenseOnlyError: always.
        """
        raise DenseOnlyError(
            "TorchScript cannot compile weights that are assembled from Lego filters; script "
            "legocompress.to_dense(model), or use torch.jit.trace, torch.compile or torch.export"
        )

    def extra_repr(self) -> str:
        """The text of the replaced class, and the sizes of the Lego unit."""
        s = self.lego_shape
        unit = f"n_lego={s.n_lego}, n_split={s.n_split}, n_terms={s.n_terms}"
        return f"{super().extra_repr()}, {unit}, route={self._route}"


_LEGO_CLASSES: dict[type[nn.Module], type[LegoModule]] = {}


def lego_class(base: type[nn.Module]) -> type[LegoModule]:
    """Return the Lego class that derives from a Conv2d or Linear class; created once per class."""
    if base not in _LEGO_CLASSES:
        namespace = {"__module__": __name__}
        _LEGO_CLASSES[base] = type(f"Lego{base.__name__}", (LegoModule, base), namespace)
    return _LEGO_CLASSES[base]


def replaced_class(module: LegoModule) -> type[nn.Module]:
    """The class of the layer that a Lego module replaced."""
    return type(module).__mro__[2]


def computes_plainly(layer: nn.Module) -> bool:
    """Whether a layer computes exactly as nn.Conv2d, timm's Conv2dSame or nn.Linear does.

    Only such a layer may run by a route other than its own code. Others are those whose class or
    instance changes a method on the way to the convolution, and those whose weight or bias is not
    a plain parameter. A Lego layer counts as the layer that it replaced. Hooks do not count.
    """
    if isinstance(layer, LegoModule):
        return _has_plain_methods(layer, replaced_class(layer)) and _has_plain_bias(layer)
    weight = layer._parameters.get("weight")
    has_plain_values = is_plain_parameter(weight) and _has_plain_bias(layer)
    return has_plain_values and _has_plain_methods(layer, type(layer))


def _has_plain_methods(layer: nn.Module, cls: type[nn.Module]) -> bool:
    return is_plain_class(cls) and not has_replaced_method(layer)


def _has_plain_bias(layer: nn.Module) -> bool:
    bias = layer._parameters.get("bias")
    return "bias" in layer._parameters and (bias is None or is_plain_parameter(bias))


def _blank(base: type[nn.Module]) -> LegoModule:
    cls = lego_class(base)
    return cls.__new__(cls)


def is_channels_last(weight: Tensor) -> bool:
    """Whether a weight is laid out in channels_last and in no other format."""
    # A 1 x 1 filter fits both layouts; its weight is right in either.
    if weight.dim() != 4 or weight.is_contiguous():
        return False
    return weight.is_contiguous(memory_format=torch.channels_last)


def lego_banks(model: nn.Module) -> list[list[tuple[str, LegoModule]]]:
    """Group the Lego modules of a model by their bank, each group in the order of the model."""
    banks: dict[int, list[tuple[str, LegoModule]]] = {}
    for name, module in lego_modules(model):
        banks.setdefault(id(module.lego_filters), []).append((name, module))
    return list(banks.values())


def lego_modules(model: nn.Module) -> Iterator[tuple[str, LegoModule]]:
    """Yield each Lego module of a model once, with its first name, in the order of the model."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LegoModule))
