"""Export a network as one torch.export program of plain operators, with a dynamic batch."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call

from legocompress import kernels
from legocompress.checkpoint.codec import encode_filters
from legocompress.deploy import deploy_, deployed_graph
from legocompress.errors import DeployError, ExportError, KernelError, UsageError, first_line
from legocompress.export.interface import (
    SimpleOutputs,
    check_leaves,
    has_plain_containers,
    make_example_inputs,
    measure_differences,
)
from legocompress.files import check_free, write_atomically
from legocompress.lego.module import LegoModule, lego_banks, lego_modules
from legocompress.lego.storage import TORCH_DTYPES, round_to_storage
from legocompress.lego.surgery import to_dense_
from legocompress.models.checks import check_network, refuse_quantized

Form = Literal["lego", "assemble-at-load", "dense", "fused"]
# Largest relative difference between an export and the network: float32 sums in another order.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Exported:
    """An exported file, and how far its outputs are from those of the network.

    `max_difference` is the largest absolute difference on random images; `relative_difference` is
    the same divided by the largest output.
    """

    path: Path
    form: Form
    bytes: int
    max_difference: float
    relative_difference: float


class StoredUnit(nn.Module):
    """The stored tensors of a Lego unit: values in storage dtypes, a narrow index.

    Args:
        module: the Lego module.
        holds_bank: whether the filters are stored here; if another unit stores the same bank, the
            filters are empty.
    """

    filters: Tensor
    scales: Tensor | None
    index: Tensor
    coefficients: Tensor | None

    def __init__(self, module: LegoModule, holds_bank: bool = True) -> None:
        super().__init__()
        self.holds_bank = holds_bank
        filters, scales = torch.empty(0), list[Tensor]()
        if holds_bank:
            bank, dtype = module.lego_filters.detach(), module.storage_dtype
            filters, *scales = (t.clone() for t in encode_filters("", bank, dtype).values())
        self.register_buffer("filters", filters)
        self.register_buffer("scales", scales[0] if scales else None)
        self.register_buffer("index", module.index.to(index_dtype(module.lego_shape.n_lego)))
        gains = None
        if module.coefficients is not None:
            stored = module.coefficients_dtype
            gains = (
                round_to_storage(module.coefficients.detach(), stored)
                .to(TORCH_DTYPES[stored])
                .clone()
            )
        self.register_buffer("coefficients", gains)

    def forward(self) -> dict[str, Tensor]:
        """Decode the tensors that the Lego module computes with: name in the module -> tensor."""
        tensors = {"index": self.index.to(torch.int64)}
        if self.holds_bank and self.scales is None:
            tensors["lego_filters"] = self.filters.to(torch.float32)
        elif self.holds_bank and self.scales is not None:
            scales = self.scales.to(torch.float32).reshape(-1, *[1] * (self.filters.dim() - 1))
            tensors["lego_filters"] = self.filters.to(torch.float32) * scales
        if self.coefficients is not None:
            tensors["coefficients"] = self.coefficients.to(torch.float32)
        return tensors


def index_dtype(n_lego: int) -> torch.dtype:
    """The narrowest dtype for an index that every framework can cast to int64 and gather by."""
    if n_lego <= 2**8:
        return torch.uint8
    return torch.int16 if n_lego <= 2**15 else torch.int32


class Hollow(nn.Module):
    """A network that takes its Lego units as the last argument, so that no tool can fold them.

    Args:
        model: the network.
        shared: the name of filters that are the bank of another layer -> the name of that bank.
    """

    def __init__(self, model: nn.Module, shared: dict[str, str]) -> None:
        super().__init__()
        self.model = model
        self.shared = shared

    def forward(self, *inputs: Any) -> Any:
        """Run the network on all inputs but the last, the units: full name -> tensor of a layer."""
        *images, units = inputs
        banks = {name: units[bank] for name, bank in self.shared.items()}
        return functional_call(self.model, {**units, **banks}, tuple(images))


class _SelfContained(nn.Module):
    """A network that holds its stored Lego units, and decodes them at every run."""

    def __init__(self, hollow: Hollow, units: dict[str, StoredUnit]) -> None:
        super().__init__()
        self.hollow = hollow
        self.names = list(units)
        self.units = nn.ModuleList(units.values())

    def forward(self, *images: Tensor) -> Any:
        tensors = {}
        for name, unit in zip(self.names, self.units, strict=True):
            tensors.update({join_name(name, leaf): tensor for leaf, tensor in unit().items()})
        return self.hollow(*images, tensors)


def join_name(owner: str, leaf: str) -> str:
    """The full name of a tensor in a module."""
    return f"{owner}.{leaf}" if owner else leaf


def make_hollow_copy(model: nn.Module, form: Form) -> tuple[Hollow, dict[str, StoredUnit]]:
    """Copy a network in float32 without its Lego units; return it and the stored units.

    In the form 'lego' a layer takes the route 'reference' if its class has it; otherwise, and in
    the form 'assemble-at-load', it takes the route 'assemble'.
    """
    copied = copy.deepcopy(model).float().to(memory_format=torch.contiguous_format).cpu().eval()
    shared = {
        join_name(name, "lego_filters"): join_name(bank[0][0], "lego_filters")
        for bank in lego_banks(copied)
        for name, _ in bank[1:]
    }
    units = {}
    for name, module in lego_modules(copied):
        units[name] = StoredUnit(module, join_name(name, "lego_filters") not in shared)
        module.route = (
            "reference" if form == "lego" and "reference" in module.routes() else "assemble"
        )
        module.frozen_weight = None
        module.lego_filters = nn.Parameter(torch.empty(0))
        module.index = torch.empty(0, dtype=torch.int64)
        if module.coefficients is not None:
            module.coefficients = nn.Parameter(torch.empty(0))
    return Hollow(copied, shared), units


def build_reference(model: nn.Module, form: Form) -> nn.Module:
    """Return the network that an export is compared with: dense, float32, on the CPU, in eval mode.

    For forms that store units the values are rounded first, as `save` rounds them.
    """
    copied = copy.deepcopy(model)
    for _, module in lego_modules(copied) if form in ("lego", "assemble-at-load") else ():
        module.frozen_weight = None
        module.lego_filters.data = round_to_storage(module.lego_filters.data, module.storage_dtype)
        if module.coefficients is not None:
            gains = round_to_storage(module.coefficients.data, module.coefficients_dtype)
            module.coefficients.data = gains
    dense = to_dense_(copied).float().to(memory_format=torch.contiguous_format)
    return dense.cpu().eval()


def _deploy_copy(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """Copy a network in float32 and deploy the copy, with the kernels of this package."""
    if not kernels.available():
        raise KernelError(f"--form fused needs the compiled kernels: {kernels.why_unavailable()}")
    copied = copy.deepcopy(model).float().to(memory_format=torch.contiguous_format).cpu()
    try:
        image = tuple(x[:1] for x in inputs)
        deploy_(copied, image, only=("assemble", "fused", "winograd"), formats=("nchw",))
        return deployed_graph(copied)
    except DeployError as error:
        raise ExportError(f"--form fused: {error}; try --form lego") from error


def trace_program(module: nn.Module, *args: Any) -> ExportedProgram:
    """Export a module of batches (N, ...), and of dicts of fixed tensors, with a dynamic N.

    Raises:
        QuantizationError: the network is quantised.
        ExportError: torch.export cannot follow the network.
    """
    batch = Dim("batch")

    def dynamic_axes(value: Any) -> Any:
        if isinstance(value, tuple):  # the values of `*args`
            return tuple(map(dynamic_axes, value))
        return dict.fromkeys(value) if isinstance(value, dict) else {0: batch}

    values = inspect.signature(module.forward).bind(*args).arguments.values()
    dynamic = tuple(map(dynamic_axes, values))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # Not strict: trace by running the network, since few networks allow bytecode tracing.
            return torch.export.export(module, args, dynamic_shapes=dynamic, strict=False)
    # The tracer runs code of the network, which may raise any exception.
    except Exception as error:
        raise ExportError(
            f"torch.export cannot trace this network with a dynamic batch: {first_line(error)}. "
            "The dense weights can be exported with --to dense"
        ) from error


def check_agrees(where: str, relative: float) -> None:
    """Raise ExportError if outputs differ by more than rounding can explain."""
    if not relative <= TOLERANCE:
        raise ExportError(
            f"{where} differs from the network by {relative:.1e} of its largest output, more than "
            f"{TOLERANCE:.0e}; nothing was written. Please report the architecture; meanwhile try "
            "--form dense"
        )


def export_program(
    model: nn.Module,
    path: str | Path,
    form: Form = "lego",
    force: bool = False,
    example_input: Any = None,
) -> Exported:
    """Write a network as a torch.export program.

    The program takes the network's inputs by position, each with a dynamic batch, and returns its
    output; dataclasses, named tuples and subclasses of dict become dicts.

    All forms but 'fused' load without this package; for 'fused', import it before loading.

    Args:
        model: the converted network; the program computes in float32.
        path: the file to write.
        form: 'lego' stores the units as the checkpoint does, and computes split-transform-merge;
            'dense' stores the assembled weights; 'fused' is the network as `deploy_` runs it on
            this machine, with the compiled kernels.
        force: replace an existing file.
        example_input: (N, c, H, W), for the size of images; by default that of the configuration.
            For networks of several inputs a tuple of such tensors, or a dict of them by name.

    Raises:
        UsageError: the form is none of these, or the model is wrapped, compiled or scripted, or
            holds a lazy layer.
        KernelError: the form is 'fused', and there are no compiled kernels.
        ExportError: torch.export cannot follow the network, an input is not a float tensor, an
            output cannot be stored, or the program computes something else.
        OutputExistsError: the file exists and `force` is not given.
        OutputError: it cannot be written.
    """
    if form not in ("lego", "dense", "fused"):
        raise UsageError(
            f"--form {form} is for ONNX, whose runtimes fold constants as they load; "
            "a torch.export program has 'lego', 'dense' and 'fused'"
        )
    check_network(model)
    refuse_quantized(model, "export_program")
    target = Path(path)
    check_free(target, force)
    inputs = make_example_inputs(model, example_input, 3)
    expected = build_reference(model, form)
    with torch.no_grad():
        expected_output = expected(*inputs)
    check_leaves(expected_output)
    module: nn.Module = expected
    if form == "lego":
        module = _SelfContained(*make_hollow_copy(model, form)).eval()
    elif form == "fused":
        module = _deploy_copy(model, inputs)
    if not has_plain_containers(expected_output):
        module = SimpleOutputs(module)
    program = trace_program(module, *(x[:2] for x in inputs))
    # The program is stored with its example inputs, so make each of them one repeated number.
    small = tuple(torch.zeros(()).expand(2, *x.shape[1:]) for x in inputs)
    program.example_inputs = (small, {})
    for node in program.graph.nodes:  # traces of source lines, which are most of the file
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
            node.meta.pop(key, None)
    buffer = io.BytesIO()  # on a full disk, torch's own file writer ends the whole process
    torch.export.save(program, buffer)
    with write_atomically(target, force) as temporary:
        size = temporary.write_bytes(buffer.getbuffer())
        with torch.no_grad():
            output = torch.export.load(temporary).module()(*inputs)
            absolute, relative = measure_differences(expected_output, output)
        check_agrees("the program", relative)
    return Exported(target, form, size, absolute, relative)
