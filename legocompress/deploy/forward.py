"""The forward of a deployed module: its graph where that is valid, else the module's own code."""

from __future__ import annotations

import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from legocompress.deploy.fusing import FusedGraph
from legocompress.deploy.guard import StateGuard
from legocompress.deploy.memory_format import to_memory_format
from legocompress.deploy.recorded import forget_tapes_, record_runs
from legocompress.lego.surgery import Replacement
from legocompress.models.outputs import flatten_leaves, list_container_types
from legocompress.state.deployment import Format

# Largest difference of a deployed module from its own code, relative to the largest output.
TOLERANCE = {
    torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1,
}  # fmt: skip

NEEDS_GRADIENTS = (
    "a deployed network was called with gradients enabled, so it runs its own code, which is "
    "slower; call it under torch.no_grad() or torch.inference_mode()"
)
HAS_CHANGED = (
    "a deployed network has changed since deploy_ ({}), so it runs its own code, which is slower; "
    "call deploy_ again to deploy it as it is now"
)


class GraphForward(Replacement):
    """Stands in the place of a module's `forward` and runs a graph where that is valid.

    The graph runs as long as it computes what the module's own code would: in eval mode, without
    gradients, autocast, compilation or tracing, on inputs of the same number, device, dtype and
    rank as the example, while nothing that its own code reads has changed and no part has got a
    hook. Where that changes what the user gets unexpectedly, a warning is given.

    Args:
        module: whose forward is replaced.
        input_kinds: device, dtype and number of axes of each input.
        warned: kinds of warnings that the parts of a network have given; each is given once.
    """

    needs_gradients = NEEDS_GRADIENTS
    has_changed = HAS_CHANGED
    is_deployed = False  # whether `undeploy_` removes it

    def __init__(
        self,
        module: nn.Module,
        input_kinds: list[tuple[torch.device, torch.dtype, int]],
        warned: set[str],
    ) -> None:
        self.module, self.previous = module, module.__dict__.get("forward")
        self.graph: Any = None
        self.run: Callable[..., Any] | None = None
        self.input_kinds = input_kinds
        self.guard: StateGuard | None = None
        self.warned = warned

    @property
    def own_forward(self) -> Callable[..., Any]:
        """What the module runs without the graph."""
        return self.previous or partial(type(self.module).forward, self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own_forward)

    @property
    def __code__(self) -> Any:  # torch.export reads it
        return type(self.module).forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph, or the module's own code where the graph is not valid."""
        if kwargs or not self._is_valid_for(args):
            return self.own_forward(*args, **kwargs)
        assert self.run is not None
        with torch.no_grad():
            return self.run(*(self.prepare_input(x) for x in args))

    def prepare_input(self, x: Tensor) -> Tensor:
        """An input as the graph reads it."""
        return x

    def _is_valid_for(self, args: tuple[Any, ...]) -> bool:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state():
            return False  # compilers and exporters trace the network's own code
        if self.module.training or len(args) != len(self.input_kinds):
            return False
        if any(type(x) is not Tensor for x in args):
            return False
        if forward_ad._current_level >= 0 or any(map(is_functorch_wrapped_tensor, args)):
            return False  # the kernels know neither forward-mode derivatives nor vmap
        for x, (device, dtype, n_axes) in zip(args, self.input_kinds, strict=True):
            if (x.device, x.dtype, x.dim()) != (device, dtype, n_axes):
                return False
            if (x.requires_grad and torch.is_grad_enabled()) or torch.is_autocast_enabled(
                device.type
            ):
                return False
        if not self.is_ready() or self.guard is None:
            return False
        return not self.guard.has_new_hooks() and self._is_fresh(self.guard)

    def is_ready(self) -> bool:
        """Whether there is a graph to run."""
        return self.run is not None and self.guard is not None

    def _is_fresh(self, guard: StateGuard) -> bool:
        """Whether no parameter needs a gradient now, and nothing has changed; else warn."""
        if torch.is_grad_enabled() and guard.needs_gradients():
            self._warn_once("gradients", self.needs_gradients)
            return False
        change = guard.find_change()
        if change is not None:
            self._warn_once("change", self.has_changed.format(change))
        return change is None

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            logging.getLogger("legocompress").warning(message)

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights cannot be copied or pickled, so a copy runs the network's own code.
        return {**self.__dict__, "run": None, "graph": None, "guard": None}


class PrecisionForward(GraphForward, ABC):
    """The forward of a module in another precision, of which `deploy_` makes the fastest form."""

    @abstractmethod
    def deploy(self) -> IntegerDeployment:
        """Build what runs in its place, or say why nothing does."""


@dataclass(frozen=True)
class IntegerDeployment:
    """The deployed form of a quantised module.

    `forward` is None where a reason says why there is none.
    """

    forward: GraphForward | None
    reason: str | None
    n_layers: int = 0
    n_lego: int = 0
    n_activations: int = 0
    n_sums: int = 0


class DeployedForward(GraphForward):
    """Runs a deployed graph in the place of a module's `forward`.

    Args:
        graph: what runs instead of the module's own code.
        memory_format: of the graph's inputs.
        inputs: the example.
        warned: kinds of warnings that the parts of a network have given; each is given once.
    """

    is_deployed = True

    def __init__(
        self,
        graph: FusedGraph,
        memory_format: Format,
        inputs: tuple[Tensor, ...],
        warned: set[str],
    ) -> None:
        kinds = [(x.device, x.dtype, x.dim()) for x in inputs]
        super().__init__(graph.root, kinds, warned)
        self.graph = graph.graph_module
        recorded = record_runs(graph.graph_module)
        self.run = recorded.forward
        self.memory_format = memory_format
        live = {part for called in graph.undeployed_modules() for part in called.modules()}
        forget_tapes = partial(forget_tapes_, recorded)
        self.guard = StateGuard(graph.root, live, graph.name, forget_tapes)

    def prepare_input(self, x: Tensor) -> Tensor:
        """An input in the memory format of the graph."""
        return to_memory_format(x, self.memory_format)


def install_(
    graph: FusedGraph,
    memory_format: Format,
    inputs: tuple[Tensor, ...],
    warned: set[str],
) -> str | None:
    """Replace the module's forward by its graph, or say why the graph cannot replace it.

    The routes of the graph's layers must be in use; what they do not need is released.
    """
    for conv in graph.convs:
        conv.release_others()
    deployed = DeployedForward(graph, memory_format, inputs, warned)
    with torch.no_grad():
        expected = graph.root.forward(*inputs)
        deployed(*inputs)  # records the runs of kernel layers
        actual = deployed(*inputs)  # replays them, as later calls do
    if list_container_types(expected) != list_container_types(actual):
        return "deployed, it returns another type"
    if not outputs_agree(expected, actual):
        return "deployed, it computes something else"
    graph.root.__dict__["forward"] = deployed
    return None


def uninstall_(model: nn.Module) -> None:
    """Give every module of a network the forward back that it had before `install_`."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, GraphForward) and forward.is_deployed:
            del module.__dict__["forward"]
            if forward.previous is not None:
                module.__dict__["forward"] = forward.previous


def outputs_agree(expected: Any, actual: Any) -> bool:
    """Whether two outputs hold the same values: tensors within their tolerance, others exactly."""
    leaves, others = list(flatten_leaves(expected)), list(flatten_leaves(actual))
    return [path for path, _ in leaves] == [path for path, _ in others] and all(
        _agree(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else _are_equal(a, b)
        for (_, a), (_, b) in zip(leaves, others, strict=True)
    )


def _are_equal(expected: Any, actual: Any) -> bool:
    if isinstance(expected, float) and isinstance(actual, float):
        return math.isclose(expected, actual, rel_tol=TOLERANCE[torch.float32])
    return type(expected) is type(actual) and bool(expected == actual)


def _agree(expected: Tensor, actual: Tensor) -> bool:
    """Whether two outputs are equal within the tolerance of their dtype."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    if not expected.is_floating_point():
        return True  # integers, such as classes, may differ after rounding
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return False
    limit = TOLERANCE[expected.dtype]
    expected, actual = expected[finite].double(), actual[finite].double()
    gap = (expected - actual).abs()
    return not gap.numel() or bool(gap.max() <= limit * expected.abs().max())
