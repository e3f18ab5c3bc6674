"""A network as one torch.export program of plain operators, with a dynamic batch."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from legocompress import kernels
from legocompress.codec import stored_filters
from legocompress.conv import LegoModule, lego_modules, to_dense_
from legocompress.convert import TORCH_DTYPES, rounded
from legocompress.deploy import deploy_, deployed_graph
from legocompress.errors import DeployError, ExportError, KernelError, UsageError, first_line
from legocompress.files import check_free, writing
from legocompress.probe import default_input

Form = Literal["lego", "assemble-at-load", "dense", "fused"]
# What an export may differ from the network by: float32 sums in another order, no more.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how far its outputs are from the network's.

    `max_difference` is the largest absolute one on random images, `relative_difference` the same
    over the largest output.
    """

    path: Path
    form: Form
    bytes: int
    max_difference: float
    relative_difference: float


class StoredUnit(nn.Module):
    """The tensors of a Lego unit as they are stored: values in storage dtypes, a narrow index."""

    filters: Tensor
    scales: Tensor | None
    index: Tensor
    coefficients: Tensor | None

    def __init__(self, module: LegoModule) -> None:
        super().__init__()
        filters, *scales = stored_filters(
            "", module.lego_filters.detach(), module.storage_dtype
        ).values()
        self.register_buffer("filters", filters.clone())
        self.register_buffer("scales", scales[0] if scales else None)
        self.register_buffer("index", module.index.to(index_dtype(module.lego_shape.n_lego)))
        gains = None
        if module.coefficients is not None:
            dtype = module.coefficients_dtype
            gains = rounded(module.coefficients.detach(), dtype).to(TORCH_DTYPES[dtype]).clone()
        self.register_buffer("coefficients", gains)

    def forward(self) -> dict[str, Tensor]:
        """The tensors that the Lego module computes with, by their names there."""
        tensors = {"index": self.index.to(torch.int64)}
        if self.scales is None:
            tensors["lego_filters"] = self.filters.to(torch.float32)
        else:
            scales = self.scales.to(torch.float32).reshape(-1, *[1] * (self.filters.dim() - 1))
            tensors["lego_filters"] = self.filters.to(torch.float32) * scales
        if self.coefficients is not None:
            tensors["coefficients"] = self.coefficients.to(torch.float32)
        return tensors


def index_dtype(n_lego: int) -> torch.dtype:
    """The narrowest type of whole bytes that every framework can gather by, after a cast."""
    if n_lego <= 2**8:
        return torch.uint8
    return torch.int16 if n_lego <= 2**15 else torch.int32


class Hollow(nn.Module):
    """A network whose Lego units come as an argument: nothing can be folded into them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, units: dict[str, Tensor]) -> Any:
        """Run the network with `units`: each Lego module's tensors by their full names."""
        return functional_call(self.model, units, (image,))


class _SelfContained(nn.Module):
    """A network that holds its Lego units as they are stored, and decodes them as it runs."""

    def __init__(self, hollow: Hollow, units: dict[str, StoredUnit]) -> None:
        super().__init__()
        self.hollow = hollow
        self.names = list(units)
        self.units = nn.ModuleList(units.values())

    def forward(self, image: Tensor) -> Any:
        tensors = {}
        for name, unit in zip(self.names, self.units, strict=True):
            tensors.update({within(name, leaf): tensor for leaf, tensor in unit().items()})
        return self.hollow(image, tensors)


def within(owner: str, leaf: str) -> str:
    """The full name of a module's tensor."""
    return f"{owner}.{leaf}" if owner else leaf


def hollow_copy(model: nn.Module, form: Form) -> tuple[Hollow, dict[str, StoredUnit]]:
    """A float32 copy of a network without its Lego units, and those units as they are stored.

    In the form 'lego' a layer merges if its class can (`LegoModule.routes`); else, and in the form
    'assemble-at-load', its weight is assembled.
    """
    copied = copy.deepcopy(model).float().to(memory_format=torch.contiguous_format).cpu().eval()
    units = {}
    for name, module in lego_modules(copied):
        units[name] = StoredUnit(module)
        module.route = (
            "reference" if form == "lego" and "reference" in module.routes() else "assemble"
        )
        module.frozen_weight = None
        module.lego_filters = nn.Parameter(torch.empty(0))
        module.index = torch.empty(0, dtype=torch.int64)
        if module.coefficients is not None:
            module.coefficients = nn.Parameter(torch.empty(0))
    return Hollow(copied), units


def reference(model: nn.Module, form: Form) -> nn.Module:
    """The network that an export is held against: dense, float32, on the CPU, in eval mode.

    Forms that store units round them, as `save` does, where training has moved them.
    """
    copied = copy.deepcopy(model)
    for _, module in lego_modules(copied) if form in ("lego", "assemble-at-load") else ():
        module.frozen_weight = None
        module.lego_filters.data = rounded(module.lego_filters.data, module.storage_dtype)
        if module.coefficients is not None:
            gains = rounded(module.coefficients.data, module.coefficients_dtype)
            module.coefficients.data = gains
    dense = to_dense_(copied).float().to(memory_format=torch.contiguous_format)
    return dense.cpu().eval()


def _fused(model: nn.Module, images: Tensor) -> nn.Module:
    """A float32 copy of a network as `deploy_` runs it here, with the kernels of this package."""
    if not kernels.available():
        raise KernelError(f"--form fused needs the compiled kernels: {kernels.why_unavailable()}")
    copied = copy.deepcopy(model).float().to(memory_format=torch.contiguous_format).cpu()
    try:
        deploy_(copied, images[:1], only=("assemble", "fused", "winograd"), formats=("nchw",))
        return deployed_graph(copied)
    except DeployError as error:
        raise ExportError(f"--form fused: {error}; --form lego may do") from error


def example_images(model: nn.Module, example_input: Tensor | None, batch: int = 2) -> Tensor:
    """A batch of random images, float32, of the example's size or the configuration's."""
    example = default_input(model) if example_input is None else example_input
    if example is None:
        raise UsageError("the model has no parameter to tell its input by; give example_input")
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, *example.shape[1:], generator=generator)


def trace(module: nn.Module, *args: Any) -> ExportedProgram:
    """Export a module of (images, ...) with a dynamic batch.

    Raises:
        ExportError: torch.export cannot follow the network.
    """
    dynamic = ({0: Dim("batch")}, *(dict.fromkeys(arg) for arg in args[1:]))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # Traced by running it, not by its bytecode, which few networks allow.
            return torch.export.export(module, args, dynamic_shapes=dynamic, strict=False)
    # The tracer runs the network's own code, which may refuse in any way.
    except Exception as error:
        raise ExportError(
            f"torch.export cannot trace this network with a dynamic batch: {first_line(error)}. "
            "The dense weights can be exported with --to dense"
        ) from error


def differences(expected: Any, found: Any) -> tuple[float, float]:
    """The largest difference between two nested outputs, absolute and over the largest value."""
    pairs = list(zip(tree_leaves(expected), tree_leaves(found), strict=True))
    absolute = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    return absolute, absolute / max(max(float(a.abs().max()) for a, _ in pairs), 1e-30)


def check_agrees(where: str, relative: float) -> None:
    """Raise ExportError if outputs are further off than rounding explains."""
    if not relative <= TOLERANCE:
        raise ExportError(
            f"{where} differs from the network by {relative:.1e} of its largest output, more than "
            f"{TOLERANCE:.0e}; nothing was written. Please report the architecture; --form dense "
            "may do meanwhile"
        )


def export_program(
    model: nn.Module,
    path: str | Path,
    form: Form = "lego",
    force: bool = False,
    example_input: Tensor | None = None,
) -> Exported:
    """Write a network as a torch.export program.

    All forms but 'fused' reload without this package; for 'fused', import it first.

    Args:
        model: the converted network; it runs in float32 there.
        path: the file to write.
        form: 'lego' stores the units as the checkpoint does and merges; 'dense' has the assembled
            weights; 'fused' is the network as `deploy_` runs it here, on the compiled kernels.
        force: replace what stands there.
        example_input: (N, c, H, W), for the size of images; by default the configuration's.

    Raises:
        UsageError: the form is none of these.
        KernelError: the form is 'fused', and there are no compiled kernels.
        ExportError: torch.export cannot follow the network, or the program is not equal to it.
        OutputExistsError: the file exists and `force` is not given.
        OutputError: it cannot be written.
    """
    if form not in ("lego", "dense", "fused"):
        raise UsageError(
            f"--form {form} is for ONNX, whose runtimes fold constants as they load; "
            "a torch.export program has 'lego', 'dense' and 'fused'"
        )
    target = Path(path)
    check_free(target, force)
    images = example_images(model, example_input, 3)
    expected = reference(model, form)
    module: nn.Module = expected
    if form == "lego":
        module = _SelfContained(*hollow_copy(model, form)).eval()
    elif form == "fused":
        module = _fused(model, images)
    program = trace(module, images[:2])
    # The program is stored with its example, so that is one number, repeated.
    program.example_inputs = ((torch.zeros(()).expand(images[:2].shape),), {})
    for node in program.graph.nodes:  # where each line came from, which is most of the file
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
            node.meta.pop(key, None)
    with writing(target, force) as temporary:
        with temporary.open("wb") as file:
            torch.export.save(program, file)
        size = temporary.stat().st_size
        with torch.no_grad():
            found = torch.export.load(temporary).module()(images)
            absolute, relative = differences(expected(images), found)
        check_agrees("the program", relative)
    return Exported(target, form, size, absolute, relative)
