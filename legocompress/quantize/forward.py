"""The forward of a quantised module: its integers where they are valid, else its own fp32 code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from legocompress import kernels
from legocompress.deploy.forward import GraphForward, IntegerDeployment, PrecisionForward
from legocompress.deploy.guard import StateGuard
from legocompress.deploy.recorded import record_runs
from legocompress.errors import CheckpointError, KernelError, LegoError, first_line
from legocompress.models.outputs import flatten_tensors
from legocompress.models.probe import evaluating
from legocompress.quantize.assignment import assign_roles
from legocompress.quantize.compiled import compile_graph, is_compiled, returns_floats
from legocompress.quantize.integer_graph import IntegerGraph, trace_integer_graph
from legocompress.quantize.layers import ConvLayer, LinearLayer
from legocompress.quantize.lowering import lower_graph
from legocompress.quantize.operators import IntegerConvLayer
from legocompress.quantize.rounding import is_rounded
from legocompress.state.quantization import QuantizedPart

NEEDS_GRADIENTS = (
    "a quantised network was called with gradients enabled, so it computes in fp32; call it under "
    "torch.no_grad() or torch.inference_mode()"
)
HAS_CHANGED = (
    "a quantised network has changed since quantize_ ({}), so it computes in fp32; call "
    "unquantize_ and then quantize_ to quantise it as it is now"
)


class QuantizedForward(PrecisionForward):
    """Runs the emulation of a quantised module in the place of its `forward`.

    The integers are made from the weights and the record at the first call; so a copy of the
    network, and one that was loaded, computes as the original does.

    Args:
        name: the module's name in the network; '' for the root.
        module: the network or a part of it, whose weights lie on the int8 grid.
        part: its ranges and shifts.
        warned: kinds of warnings that the parts of a network have given; each is given once.
    """

    needs_gradients = NEEDS_GRADIENTS
    has_changed = HAS_CHANGED

    def __init__(
        self,
        name: str,
        module: nn.Module,
        part: QuantizedPart,
        warned: set[str],
    ) -> None:
        kinds = [(torch.device("cpu"), torch.float32, len(shape)) for shape in part.inputs]
        super().__init__(module, kinds, warned)
        self.name, self.part = name, part
        self.off_grid: str | None = None  # a layer whose weights were no integers at the first call

    def is_ready(self) -> bool:
        """Whether there are integers to run; they are made at the first call.

        Raises:
            CheckpointError: the record does not fit the network.
        """
        if self.run is None and self.off_grid is None:
            if self._has_hooks():
                return False  # a hooked layer is not fused, and tracing would call the hooks
            self._build()
        if self.off_grid is not None:
            self._warn_once("change", self.has_changed.format(self.off_grid))
        return super().is_ready()

    def _has_hooks(self) -> bool:
        parts = (part for part in self.module.modules() if part is not self.module)
        return any(part._forward_hooks or part._forward_pre_hooks for part in parts)

    def _build(self) -> None:
        graph = self.trace()
        for _, layer in graph.layers():
            source = weight_owner(layer)
            if layer.name not in self.part.float_layers and not is_rounded(source):
                self.off_grid = f"{layer.name}.weight"
                return
        lowered, live = lower_part(graph, self.part)
        self.graph, self.run = lowered, lowered.forward
        self.guard = StateGuard(self.module, live, self.name)

    def deploy(self) -> IntegerDeployment:
        """The same integers by kernels, with the same bits.

        Raises:
            CheckpointError: the record does not fit the network.
        """
        reason = kernels.why_unavailable()
        if reason is None and not self.is_ready():
            reason = "the network has changed since quantize_"
        if reason is not None:
            return IntegerDeployment(None, reason)
        try:
            forward = CompiledForward(self)
            inputs = self.example()
            with torch.no_grad():
                expected = self.graph(*inputs)
                for _ in range(2):  # the second time, recorded calls are replayed
                    if not _are_equal(expected, forward.run_compiled(*inputs)):
                        return IntegerDeployment(None, "the kernels compute something else")
        except KernelError as error:
            return IntegerDeployment(None, first_line(error))
        convs = [m.conv for m in self.graph.modules() if isinstance(m, IntegerConvLayer)]
        return IntegerDeployment(
            forward,
            None,
            n_layers=len(convs),
            n_lego=sum(not conv.is_dense for conv in convs),
            n_activations=sum((conv.low, conv.high) != (0, 255) for conv in convs)
            + sum(conv.table is not None for conv in convs),
            n_sums=sum(conv.residual_multiplier != 0 for conv in convs),
        )

    def example(self) -> tuple[Tensor, ...]:
        """Random inputs of the shapes of the record, always the same."""
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(shape, generator=generator) for shape in self.part.inputs)

    def trace(self) -> IntegerGraph:
        """The module's graph in fp32, traced anew.

        Raises:
            CheckpointError: the module cannot be traced with the inputs of the record.
        """
        inputs = self.example()
        # A module that is itself one conv is called when it is traced.
        ours = self.module.__dict__.pop("forward", None)
        try:
            if self.previous is not None:
                self.module.__dict__["forward"] = self.previous
            with evaluating(self.module):
                return trace_integer_graph(self.name, self.module, inputs)
        # The network's own code may refuse the shapes of a damaged record with any exception.
        except Exception as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"quantisation: {self.name or 'the network'!r} cannot be traced on inputs of the "
                f"stored shapes {self.part.inputs}: {first_line(error)}"
            ) from error
        finally:
            self.module.__dict__.pop("forward", None)
            if ours is not None:
                self.module.__dict__["forward"] = ours


class CompiledForward(GraphForward):
    """Runs a quantised module by the int8 kernels, and by its emulation where these refuse.

    Args:
        quantized: the emulation, which stays behind it.

    Raises:
        KernelError: a kernel refuses the numbers of a layer.
    """

    needs_gradients = NEEDS_GRADIENTS
    has_changed = HAS_CHANGED
    is_deployed = True

    def __init__(self, quantized: QuantizedForward) -> None:
        super().__init__(quantized.module, quantized.input_kinds, quantized.warned)
        self.previous = quantized
        self.graph = compile_graph(quantized.graph)
        self.run_compiled = record_runs(self.graph, is_compiled, returns_floats).forward
        self.emulation = quantized.graph
        self.run = self._run
        self.guard = quantized.guard

    def _run(self, *inputs: Tensor) -> Any:
        try:
            return self.run_compiled(*inputs)
        except KernelError:  # sizes that the kernels do not take
            return self.emulation(*inputs)

    def prepare_input(self, x: Tensor) -> Tensor:
        """An input in the layout that the kernels read."""
        return x.contiguous()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "run_compiled": None, "emulation": None}


def _are_equal(expected: Any, actual: Any) -> bool:
    """Whether two outputs hold the same bits."""
    pairs = zip(flatten_tensors(expected), flatten_tensors(actual), strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def lower_part(graph: IntegerGraph, part: QuantizedPart) -> tuple[fx.GraphModule, set[nn.Module]]:
    """The graph of integers of a part, and the modules that it calls as they are.

    Raises:
        CheckpointError: the record does not fit the graph.
    """
    unknown = part.float_layers.keys() - {layer.name for _, layer in graph.layers()}
    if unknown:
        raise CheckpointError(f"quantisation: the network has no layer {min(unknown)!r}")
    set_exact_(graph, part.float_layers)
    try:
        assignment = assign_roles(graph, part.float_layers)
    except CheckpointError:
        raise
    except LegoError as error:
        raise CheckpointError(f"quantisation: {error}") from error
    convs = {
        layer.name
        for node, layer in graph.layers()
        if isinstance(layer, ConvLayer) and node in assignment.integer
    }
    _check_names("ranges", part.ranges, assignment.needed)
    _check_names("shifts", part.shifts, convs)
    lowered = lower_graph(graph, assignment, part.ranges, part.shifts)
    return lowered, graph.live_modules()


def set_exact_(graph: IntegerGraph, names: Collection[str]) -> None:
    """Let the convs of these names, and no others, compute with weights that are not rounded."""
    for _, layer in graph.layers():
        if isinstance(layer, ConvLayer):
            layer.is_exact = layer.name in names


def _check_names(kind: str, stored: Mapping[str, Any], needed: set[str]) -> None:
    odd = sorted(stored.keys() ^ needed)
    if odd:
        state = "does not need them" if odd[0] in stored else "needs them"
        raise CheckpointError(f"quantisation: {kind} of {odd[0]!r}: the network {state}")


def weight_owner(layer: nn.Module) -> nn.Module | None:
    """The layer of the network that holds the weights, if one does."""
    if isinstance(layer, LinearLayer):
        return layer.layer[0]
    if isinstance(layer, ConvLayer) and layer.folded is not None:
        return layer.folded.layer
    return None


def install_parts_(model: nn.Module, parts: Mapping[str, QuantizedPart]) -> None:
    """Let the parts of a network compute in integers.

    Raises:
        CheckpointError: the network has no part of a name.
    """
    modules = dict(model.named_modules())
    for name in parts:
        if name not in modules:
            raise CheckpointError(f"quantisation: the network has no part called {name!r}")
    warned: set[str] = set()
    for name, part in parts.items():
        module = modules[name]
        forward = QuantizedForward(name, module, part, warned)
        module.__dict__["forward"] = forward


def quantized_parts(model: nn.Module) -> set[str]:
    """The names of the modules that compute in integers, by the emulation or by kernels."""
    kinds = (QuantizedForward, CompiledForward)
    named = model.named_modules()
    return {name for name, part in named if isinstance(part.__dict__.get("forward"), kinds)}


def uninstall_parts_(model: nn.Module) -> None:
    """Let every module compute by its own code again."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, QuantizedForward):
            del module.__dict__["forward"]
            if forward.previous is not None:
                module.__dict__["forward"] = forward.previous
