"""deploy_: a network in its fastest form for one machine, batch and number of threads."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from legocompress import kernels
from legocompress.deploy.choices import this_machine
from legocompress.deploy.graph import Graph, trace
from legocompress.deploy.site import is_site
from legocompress.deploy.taped import taped
from legocompress.deploy.tune import Routes, TunedGraph, given, in_layout, measured, misfit
from legocompress.errors import DeployError, UsageError
from legocompress.lego.module import lego_modules
from legocompress.lego.surgery import Replacement
from legocompress.models.probe import default_input, evaluating
from legocompress.state.deployment import Choices, ConvRoute, Format

MAX_HINTS = 16
ModelT = TypeVar("ModelT", bound=nn.Module)
# Largest difference of a deployed network from its own code, relative to the largest output.
WHOLE_TOLERANCE = {
    torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1,
}  # fmt: skip


@dataclass(frozen=True)
class Deployment:
    """What `deploy_` did, kept as `model.lego_deployment`.

    `milliseconds` holds, for each layer, the median of each route in each format ('fused, nchw');
    empty where the choices were given. `notes` tells which parts could not be traced, and why.
    """

    choices: Choices
    n_layers: int
    n_lego: int
    n_norms: int
    n_activations: int
    n_sums: int
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hint_used: bool = False


def deploy_(
    model: ModelT,
    example_input: Any = None,
    choices: Choices | None = None,
    remeasure: bool = False,
    only: tuple[ConvRoute, ...] | None = None,
    formats: tuple[Format, ...] = ("nchw", "channels_last"),
    seconds: float = 60.0,
    on_layer: Callable[[str], None] | None = None,
) -> ModelT:
    """Bring a network into its fastest form for this machine, in place, and return it.

    The network is traced (part by part where it does not trace as a whole); BatchNorm is folded
    exactly, activations and residual sums are fused into the layers before them; then the routes
    of each layer are timed in both memory formats, and the fastest whole network is kept, all-dense
    forms among them. The parameters stay as they are, so the network can still be saved,
    exported and trained: in train mode, with gradients, autocast, another device or dtype, once a
    parameter has changed or somebody hooks a part of it, it computes as before it was deployed. A
    layer that has hooks already is left alone. Works on dense networks too.

    Args:
        model: the network; it is put into eval mode.
        example_input: a tensor (N, c, H, W) or a tuple of two; by default one image of the size
            that the model's configuration names. Other sizes run too, by the same choices.
        choices: routes to take without timing any, as `model.lego_deployment.choices` holds them.
            By default those of the checkpoint, if they were found on such a machine with these
            sizes and threads.
        remeasure: time the routes even where the checkpoint's choices would do.
        only: of the routes that a layer has, time these alone, where it has one of them.
        formats: memory formats to try.
        seconds: stop repeating the timings of whole networks after about as much.
        on_layer: called with the name of each layer that has been timed, twice a layer.

    Raises:
        DeployError: the choices do not fit the network, or a part computes something else when
            deployed.
        UsageError: the example is no image.
    """
    undeploy_(model)
    model.eval()
    args = _arguments(model, example_input)
    machine = this_machine(_tensors(args))
    missing = kernels.why_unavailable()
    if missing is not None and _tensors(args)[0].device.type == "cpu":
        _tell_once(f"deploy_ goes on without the fused kernel, slower: {missing}")
    graphs, notes = _graphs(model, args)
    hints: tuple[Choices, ...] = getattr(model, "lego_choices", ())
    known = choices
    if known is None and not remeasure and only is None:
        known = next((hint for hint in hints if hint.machine == machine), None)
    if known is not None:
        reason = misfit([graph for graph, _ in graphs], known, _tensors(args)[0])
        if reason is not None and choices is not None:
            raise DeployError(f"the choices do not fit this network here: {reason}")
        known = known if reason is None else None
    chosen: dict[str, Format] = {}
    routes: Routes = {}
    times: dict[str, dict[str, float]] = {}
    installed: list[Graph] = []
    # What a graph calls as it is comes after it in the list, and is deployed before it.
    for graph, example in reversed(graphs):
        inputs = _materialized(example)
        if known is None:
            plan = measured(graph, inputs, seconds, on_layer, only, formats)
        else:
            plan = given(graph, inputs, known)
        chosen[graph.name] = plan.layout
        routes.update(plan.routes)
        times.update(plan.milliseconds)
        fault = _install_(graph, plan, inputs)
        if fault is None:
            installed.append(graph)
        else:
            notes.append(f"{graph.name or '(root)'} runs by its own code: {fault}")
    covered: set[nn.Module] = set().union(*(graph.layers for graph in installed))
    for _, module in lego_modules(model):
        if module not in covered:
            module.freeze()
    noted: Any = model
    found = Choices(machine=machine, formats=chosen, routes=routes)
    if only is None:
        others = tuple(hint for hint in hints if hint.machine != machine)
        noted.lego_choices = (*others, found)[-MAX_HINTS:]
    sites = [site for graph in installed for site in graph.convs]
    noted.lego_deployment = Deployment(
        choices=found,
        n_layers=len(sites),
        n_lego=sum(site.is_lego for site in sites),
        n_norms=sum(graph.n_norms for graph in installed),
        n_activations=sum(graph.n_activations for graph in installed),
        n_sums=sum(graph.n_sums for graph in installed),
        milliseconds=times,
        notes=tuple(notes),
        hint_used=choices is None and known is not None,
    )
    return model


@functools.cache
def _tell_once(message: str) -> None:
    logging.getLogger("legocompress").warning(message)


def undeploy_(model: ModelT) -> ModelT:
    """Take `deploy_` back: the network computes by its own code again; weights stay frozen."""
    for module in model.modules():
        own = module.__dict__.get("forward")
        if isinstance(own, _Deployed):
            del module.__dict__["forward"]
            if own.before is not None:
                module.__dict__["forward"] = own.before
    model.__dict__.pop("lego_deployment", None)
    return model


def deployed_graph(model: nn.Module) -> nn.Module:
    """What a deployed network runs as a whole, on float tensors (N, c, H, W) in NCHW.

    Raises:
        DeployError: the network is not deployed, or only some parts of it could be traced.
    """
    own = model.__dict__.get("forward")
    if not isinstance(own, _Deployed) or own.run is None:
        raise DeployError("no single graph stands for this network: deploy_ could not trace it")
    return own.graph


class _Deployed(Replacement):
    """The forward of a deployed module: its graph where that holds, else what was there before."""

    def __init__(self, graph: Graph, layout: Format, inputs: tuple[Tensor, ...]) -> None:
        self.module, self.before = graph.root, graph.root.__dict__.get("forward")
        self.graph = graph.runner
        self.run: Callable[..., Any] | None = taped(graph.runner).forward
        self.layout = layout
        self.kinds = [(x.device, x.dtype, x.dim()) for x in inputs]
        # Whoever writes to a parameter counts up its version.
        self.state = [*graph.root.parameters(), *graph.root.buffers()]
        self.version = self._version()
        parts = (m for m in graph.root.modules() if m is not graph.root)
        hooks = (h for m in parts for h in (m._forward_hooks, m._forward_pre_hooks))
        self.unheard = [listeners for listeners in hooks if not listeners]

    @property
    def own(self) -> Callable[..., Any]:
        """The module's own code."""
        return self.before or partial(type(self.module).forward, self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)

    @property
    def __code__(self) -> Any:  # torch.export looks at it
        return type(self.module).forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not self._holds(args):
            return self.own(*args, **kwargs)
        assert self.run is not None
        with torch.no_grad():
            return self.run(*(in_layout(x, self.layout) for x in args))

    def _holds(self, args: tuple[Any, ...]) -> bool:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state():
            return False  # both see through the network's own code
        if self.run is None or self.module.training or len(args) != len(self.kinds):
            return False
        for x, (device, dtype, n_axes) in zip(args, self.kinds, strict=True):
            if type(x) is not Tensor or (x.device, x.dtype, x.dim()) != (device, dtype, n_axes):
                return False
            if (x.requires_grad and torch.is_grad_enabled()) or torch.is_autocast_enabled(
                device.type
            ):
                return False
        return self._version() == self.version and not any(self.unheard)

    def _version(self) -> int:
        return sum(0 if value.is_inference() else value._version for value in self.state)

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights are of this process alone: a copy computes by the network's own code.
        return {**self.__dict__, "run": None, "graph": None, "state": [], "unheard": []}


def _arguments(model: nn.Module, example_input: Any) -> tuple[Any, ...]:
    if example_input is None:
        example_input = default_input(model)
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    if not _tensors(args):
        raise UsageError("example_input is no image: give a float tensor (N, c, H, W), or a tuple")
    return args


def _tensors(args: Any) -> tuple[Tensor, ...]:
    """The float tensors among arguments, also in a list of images."""
    if isinstance(args, Tensor):
        return (args,) if args.is_floating_point() else ()
    return sum((_tensors(arg) for arg in args if isinstance(arg, (Tensor, list, tuple))), ())


def _materialized(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs themselves, or random ones where there is only a shape."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(x.shape, generator=generator).to(x) if 0 in x.stride() else x for x in example
    )


def _graphs(
    model: nn.Module, args: tuple[Any, ...]
) -> tuple[list[tuple[Graph, tuple[Tensor, ...]]], list[str]]:
    """The parts of a network that trace, largest first, with inputs for each, and what did not."""
    graphs: list[tuple[Graph, tuple[Tensor, ...]]] = []
    notes: list[str] = []
    seen: set[nn.Module] = set()
    examples: dict[nn.Module, tuple[Tensor, ...] | str] = {}

    def visit(name: str, module: nn.Module) -> None:
        layers = (m for m in module.modules() if is_site(m, heard=True))
        if module in seen or next(layers, None) is None:
            return
        seen.add(module)
        if module is model:
            example = args if _tensors(args) == args else "it takes more than tensors"
        else:
            if not examples:
                examples.update(_example_calls(model, args))
            example = examples.get(module, "it did not run")
        if not isinstance(example, str):
            try:
                graph = trace(name, module, _materialized(example))
            # Tracing runs the network's own code on values it may refuse: it stays as it is then.
            except Exception as error:
                example = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            else:
                if graph.convs:
                    graphs.append((graph, example))
                names = {m: n for n, m in module.named_modules()}
                for part in graph.opaque():
                    visit(".".join(p for p in (name, names.get(part, "")) if p), part)
                return
        notes.append(f"{name or '(root)'} is not traced as a whole: {example}")
        for child, part in module.named_children():
            visit(f"{name}.{child}" if name else child, part)

    with evaluating(model):
        visit("", model)
    return graphs, notes


def _example_calls(
    model: nn.Module, inputs: tuple[Any, ...]
) -> dict[nn.Module, tuple[Tensor, ...] | str]:
    """Random inputs for each module, of the kind that its first call got in one pass."""
    found: dict[nn.Module, tuple[Tensor, ...] | str] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plain = args and all(type(x) is Tensor and x.is_floating_point() for x in args)
        if kwargs or not plain:
            found.setdefault(module, "it is not called on tensors alone")
        else:
            # Not kept in memory, so one value that has the shape stands in for now.
            found.setdefault(module, tuple(x.new_zeros(1).expand(x.shape) for x in args))

    hooks = [m.register_forward_pre_hook(record, with_kwargs=True) for m in model.modules()]
    try:
        with evaluating(model):
            model(*inputs)
    # A detector takes a list of images, which its own code makes of a batch or not.
    except Exception as error:
        found.setdefault(model, f"{type(error).__name__}: {error}".splitlines()[0][:200])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _install_(graph: Graph, tuned: TunedGraph, inputs: tuple[Tensor, ...]) -> str | None:
    """Put the graph in the place of the module's own forward, or say why it may not stand there."""
    for site in graph.convs:
        site.settle()
    deployed = _Deployed(graph, tuned.layout, inputs)
    with torch.no_grad():
        expected = _outputs(graph.root.forward(*inputs))
        deployed(*inputs)  # recorded, and then run as any later call
        found = _outputs(deployed(*inputs))
    if len(expected) != len(found) or not all(map(_agree, expected, found)):
        return "deployed, it computes something else"
    graph.root.__dict__["forward"] = deployed
    return None


def _outputs(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _outputs(part)]
    return []


def _agree(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.is_floating_point():
        return True  # classes and such may tip over by rounding
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return False
    limit = WHOLE_TOLERANCE[expected.dtype]
    expected, found = expected[finite].double(), found[finite].double()
    gap = (expected - found).abs()
    return not gap.numel() or bool(gap.max() <= limit * expected.abs().max())
