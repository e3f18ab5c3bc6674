"""deploy_: a network in its fastest form for one machine, batch size and number of threads."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from legocompress import kernels
from legocompress.deploy.autotune import autotune
from legocompress.deploy.backends import BACKENDS
from legocompress.deploy.forward import (
    GraphForward,
    IntegerDeployment,
    PrecisionForward,
    install_,
    uninstall_,
)
from legocompress.deploy.fusing import FusedGraph
from legocompress.deploy.machine import describe_machine
from legocompress.deploy.memory_format import TORCH_FORMATS
from legocompress.deploy.partition import Part, Partition, describe_error, partition_model
from legocompress.deploy.route_plan import (
    RoutePlan,
    explain_misfit,
    prepare_choices,
    simplest_plan,
)
from legocompress.errors import DeployError, UsageError
from legocompress.lego.module import LegoModule, ModelT
from legocompress.models.checks import refuse_wrapper
from legocompress.models.outputs import flatten_float_tensors
from legocompress.models.probe import default_input
from legocompress.state.deployment import Choices, ConvRoute, Deployment, Format, Machine
from legocompress.state.model_state import lego_state

MAX_HINTS = 16


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

    The network is traced (part by part where it does not trace as a whole). BatchNorm is folded
    exactly; activations and residual sums are fused into the layers before them. Then the routes of
    each layer are timed in both memory formats, and the fastest whole network is used; all-dense
    forms are among the candidates. Dense networks can be deployed, too.

    A quantised network runs its integers by kernels, with the same bits as before. Nothing is
    timed then.

    The parameters stay as they are, so the network can still be saved, exported and trained. Call
    it under `torch.no_grad()` or `torch.inference_mode()`. It computes as before it was deployed in
    train mode, with gradients, under autocast, on another device or dtype, after a parameter, an
    attribute or a part has changed, and after a hook was registered on a part of it. What is not
    noticed is listed in docs/python.md. A layer that has hooks already is not deployed.

    Args:
        model: the network; it is put into eval mode.
        example_input: a tensor (N, c, H, W), a tuple of arguments or a dict of keyword arguments;
            by default one image of the size that the model's configuration names. Other sizes run
            too, by the same choices.
        choices: routes to use without timing any, as `lego_state(model).deployment` holds them. By
            default those of the checkpoint, if they were timed on the same kind of machine with
            these sizes and threads.
        remeasure: time the routes even if the checkpoint's choices could be used.
        only: time these routes alone, in layers that have one of them.
        formats: memory formats to try.
        seconds: about how long to time whole networks.
        on_layer: called with the name of each layer that has been timed, once per memory format.

    A part that cannot be traced, timed or run in its deployed form runs by its own code, and a note
    in `lego_state(model).deployment` says why.

    Raises:
        DeployError: the choices do not fit the network.
        UsageError: the example contains no image or does not fit the forward of the model, there is
            no such route or format, or the model is wrapped, compiled or scripted.
    """
    refuse_wrapper(model)
    _check_usage(only, formats)
    undeploy_(model)
    state = lego_state(model)
    if state.quantization is not None:
        return _deploy_quantized_(model, example_input)
    partition = partition_model(model.eval(), example_input)
    machine = describe_machine(partition.images)
    _warn_without_kernels(partition.images[0].device)
    usable_hints = () if remeasure or only is not None else state.choices
    reusable = _reusable_choices(partition, machine, choices, usable_hints)
    progress = _Progress(on_layer)

    def plan_part(graph: FusedGraph, inputs: tuple[Tensor, ...]) -> RoutePlan:
        if reusable is not None:
            return prepare_choices(graph, inputs, reusable)
        return autotune(graph, inputs, seconds, progress, only, formats)

    results: list[_PartResult] = []
    warned: set[str] = set()
    # A part that another part calls comes after it, and is deployed before it.
    for part in reversed(partition.parts):
        results.append(_deploy_part_(part, plan_part, warned))
        if progress.error is not None:
            undeploy_(model)
            raise progress.error
    installed = [result.graph for result in results if result.note is None]
    _freeze_undeployed_(partition.lego_layers, installed)

    new_choices = _combine_choices(results, machine)
    if only is None:
        state.choices = _add_hint(state.choices, new_choices)
    state.deployment = Deployment(
        choices=new_choices,
        **_count(installed),
        milliseconds={n: ms for r in results for n, ms in r.plan.milliseconds.items()},
        notes=(*partition.notes, *(r.note for r in results if r.note is not None)),
        hint_used=choices is None and reusable is not None,
    )
    return model


def _deploy_quantized_(model: ModelT, example_input: Any) -> ModelT:
    """Run the integers of a quantised network by kernels; nothing is timed."""
    example = default_input(model) if example_input is None else example_input
    images = tuple(flatten_float_tensors(example)) or (torch.zeros(1, 3, 1, 1),)
    _warn_without_kernels(images[0].device)
    model.eval()
    installed: list[IntegerDeployment] = []
    notes = list(getattr(lego_state(model).quantization, "notes", ()))
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if not isinstance(forward, PrecisionForward):
            continue
        made = forward.deploy()
        if made.forward is None:
            notes.append(f"{name or '(root)'} runs by the emulation: {made.reason}")
            continue
        module.__dict__["forward"] = made.forward
        installed.append(made)
    lego_state(model).deployment = Deployment(
        choices=Choices(machine=describe_machine(images), formats={}, routes={}),
        n_layers=sum(made.n_layers for made in installed),
        n_lego=sum(made.n_lego for made in installed),
        n_norms=0,
        n_activations=sum(made.n_activations for made in installed),
        n_sums=sum(made.n_sums for made in installed),
        notes=tuple(notes),
        precision="int8",
    )
    return model


def _check_usage(only: tuple[ConvRoute, ...] | None, formats: tuple[Format, ...]) -> None:
    unknown = [route for route in only or () if route not in BACKENDS]
    if unknown:
        raise UsageError(f"only={only}: no route {unknown[0]!r}; there are {', '.join(BACKENDS)}")
    if not formats or any(name not in TORCH_FORMATS for name in formats):
        raise UsageError(f"formats={formats}: name one or more of {', '.join(TORCH_FORMATS)}")


class _Progress:
    """Calls the user's `on_layer`, and remembers its error, which is not a fault of the part."""

    def __init__(self, on_layer: Callable[[str], None] | None) -> None:
        self.on_layer = on_layer
        self.error: Exception | None = None

    def __call__(self, name: str) -> None:
        try:
            if self.on_layer is not None and self.error is None:
                self.on_layer(name)
        except Exception as error:
            self.error = error
            raise


class _PartResult(NamedTuple):
    """How a part is deployed; `note` says why it runs by its own code, if it does."""

    graph: FusedGraph
    plan: RoutePlan
    note: str | None = None


def _deploy_part_(
    part: Part,
    plan_part: Callable[[FusedGraph, tuple[Tensor, ...]], RoutePlan],
    warned: set[str],
) -> _PartResult:
    """Plan and install a part."""
    plan = simplest_plan(part.graph)
    try:
        inputs = part.inputs()
        plan = plan_part(part.graph, inputs)
        fault = install_(part.graph, plan.memory_format, inputs, warned)
    # A library or the network's own code may refuse with any exception; nothing is installed then.
    except Exception as error:
        fault = describe_error(error)
    if fault is None:
        return _PartResult(part.graph, plan)
    name = part.graph.name or "(root)"
    return _PartResult(part.graph, plan, f"{name} runs by its own code: {fault}")


def undeploy_(model: ModelT) -> ModelT:
    """Undo `deploy_`: the network runs its own code again; its weights stay frozen."""
    uninstall_(model)
    lego_state(model).deployment = None
    return model


def deployed_graph(model: nn.Module) -> nn.Module:
    """What a deployed network runs as a whole, on float tensors (N, c, H, W) in NCHW.

    Raises:
        DeployError: the network is not deployed, or only some parts of it could be traced.
    """
    forward = model.__dict__.get("forward")
    if not isinstance(forward, GraphForward) or not forward.is_deployed or forward.run is None:
        deployment = lego_state(model).deployment
        notes = () if deployment is None else deployment.notes
        reason = next((note for note in notes if note.startswith("(root)")), "it is not deployed")
        raise DeployError(f"no single graph stands for this network: {reason}")
    graph: nn.Module = forward.graph
    return graph


def _warn_without_kernels(device: torch.device) -> None:
    reason = kernels.why_unavailable()
    if reason is not None and device.type == "cpu":
        _warn_once(f"deploy_ goes on without the fused kernel, slower: {reason}")


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger("legocompress").warning(message)


def _reusable_choices(
    partition: Partition, machine: Machine, choices: Choices | None, hints: tuple[Choices, ...]
) -> Choices | None:
    """The user's choices, else the hint that was timed on such a machine, if it fits the network.

    Raises:
        DeployError: the user's choices do not fit the network.
    """
    reusable = choices or next((hint for hint in hints if hint.machine == machine), None)
    if reusable is None:
        return None
    misfit = explain_misfit(partition.graphs, reusable, partition.images[0])
    if misfit is not None and choices is not None:
        raise DeployError(f"the choices do not fit this network here: {misfit}")
    return reusable if misfit is None else None


def _freeze_undeployed_(layers: list[LegoModule], installed: list[FusedGraph]) -> None:
    """Assemble the weights of the Lego layers that run by the network's own code."""
    deployed: set[nn.Module] = set().union(*(graph.source_convs for graph in installed))
    for layer in layers:
        if layer not in deployed:
            layer.freeze()


def _combine_choices(results: list[_PartResult], machine: Machine) -> Choices:
    return Choices(
        machine=machine,
        formats={result.graph.name: result.plan.memory_format for result in results},
        routes={name: route for r in results for name, route in r.plan.routes.items()},
    )


def _count(installed: list[FusedGraph]) -> dict[str, Any]:
    """The counts of a Deployment: layers, and what was folded and fused into them."""
    convs = [conv for graph in installed for conv in graph.convs]
    return {
        "n_layers": len(convs),
        "n_lego": sum(conv.is_lego for conv in convs),
        "n_norms": sum(graph.n_norms for graph in installed),
        "n_activations": sum(graph.n_activations for graph in installed),
        "n_sums": sum(graph.n_sums for graph in installed),
    }


def _add_hint(hints: tuple[Choices, ...], choices: Choices) -> tuple[Choices, ...]:
    """The hints of other machines and sizes, and these choices as the latest."""
    others = tuple(hint for hint in hints if hint.machine != choices.machine)
    return (*others, choices)[-MAX_HINTS:]
