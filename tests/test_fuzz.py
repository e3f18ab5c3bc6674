"""Hostile folders: a mutant loads to exactly what it says, or ends in a typed error; nothing else.

Each of 20,000 seeded mutants loads under a limit of time and of memory, while an audit hook watches
for anything that a loader of data has no business doing.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import legocompress as lego
from legocompress.checkpoint.codec import list_unique_tensors
from legocompress.errors import LegoError
from legocompress.lego.module import lego_banks

pytestmark = pytest.mark.slow

SHARDS, PER_SHARD = 8, 2500
REBUILT = 300  # mutants whose architecture a library builds, which takes longer
SECONDS = 5.0  # of processor time, for one mutant
GROWTH = 2**30  # bytes of address space beyond those in use
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class",
             "socket.connect", "os.remove", "os.rename", "os.mkdir", "ctypes.dlopen")  # fmt: skip


class Tiny(nn.Module):
    """A network of four convs, a norm and a Linear, that is built in a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.a = nn.Conv2d(6, 10, 3, padding=1)
        self.b = nn.Conv2d(10, 8, 1, groups=2, bias=False)
        self.c = self.a
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.norm(self.stem(x)))).mean((2, 3)))


HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 255, 2**15, 2**31 - 1, 2**31, 2**40, 2**63, 10**40, -(2**63),
    0.5, -1.5, 1e308, float("nan"), float("inf"), "", "x", "fp16", "fp32", "int8", "float16",
    "float64", "timm", "torchvision", "resnet50", "../../../etc/passwd", "/dev/zero", "a" * 5000,
    "\0", "\ud800", "__import__('os').system('false')", "${HOME}", [], {}, [[]], [0], [1] * 1000,
    {"a": 1}, {"": {}}, ["fp16"], {"__reduce__": "os.system"}, "a", "b", "head",
]  # fmt: skip
NAMES = [
    "", ".", "..", "a..b", "../a.bias", "/etc/passwd", "a/b", "a.weight", "a.weight.x", "A.bias",
    "__class__", "a.__class__", "forward", "stem", "head", "c", "c.index", "a.index", "norm.weight",
    "__metadata__", "weight", "a.lego_scales", "stem.weight_scales", "é", "x" * 3000,
]  # fmt: skip
DTYPES = ["BOOL", "U8", "I8", "I16", "I32", "I64", "U16", "F16", "BF16", "F32", "F64", "F8_E5M2",
          "F4", "X", "", 7, None]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all parts of a JSON document."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, part in value.items():
            found += places(part, (*path, key))
    elif isinstance(value, list):
        for key, part in enumerate(value):
            found += places(part, (*path, key))
    return found


def mutate_json(document: Any, rng: random.Random, names: list[str] = NAMES) -> None:
    """Change one place of a JSON document, in place."""
    path = rng.choice(places(document))
    for key in path[:-1]:
        document = document[key]
    key = path[-1]
    old = document[key]
    kind = rng.randrange(6)
    if kind == 0:
        del document[key]
    elif kind == 1 and type(old) in (int, float):
        document[key] = rng.choice([old + 1, old - 1, 2 * old, -old, old * 10**6, str(old)])
    elif kind == 2 and isinstance(document, dict):
        document[rng.choice(names)] = document.pop(key)
    elif kind == 3 and isinstance(document, dict):
        document[rng.choice(names)] = copy.deepcopy(old)
    elif kind == 4:
        other = rng.choice(list(document) if isinstance(document, dict) else range(len(document)))
        document[key], document[other] = document[other], document[key]
    else:
        document[key] = copy.deepcopy(rng.choice(HOSTILE))


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, insert or overwrite bytes."""
    data = bytearray(raw)
    start = rng.randrange(len(data) + 1)
    length = min(rng.choice([1, 1, 2, 8, 64, 4096]), len(data) - start)
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 3, 20])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[start : start + length]
    elif kind == 2:
        data[start:start] = data[start : start + length]
    elif kind == 3:
        data[start:start] = rng.randbytes(rng.choice([1, 8, 100]))
    elif kind == 4:
        data[start : start + length] = rng.randbytes(length)
    else:
        del data[start:]
    return bytes(data)


def mutate_header(raw: bytes, rng: random.Random) -> bytes:
    """Change what the header of a safetensors file says, or where it says it ends."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    kind = rng.randrange(7)
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    if kind == 0:
        mutate_json(header, rng)
    elif kind == 1:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 2:
        shape = entry["shape"]
        entry["shape"] = rng.choice([shape[::-1], [*shape, 1], shape[1:], [2**62, 4], [-1],
                                     [2**63] * 3, [0], [s + 1 for s in shape]])  # fmt: skip
    elif kind == 3:
        other = header[rng.choice([n for n in header if n != "__metadata__"])]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif kind == 4:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice([[start, end + 1], [start + 1, end], [0, 2**62],
                                            [end, start], [-1, end], [start]])  # fmt: skip
    elif kind == 5:  # an extra tensor, or a tensor under another name, that a file may well have
        header[rng.choice([*NAMES, *header])] = header.pop(name)
    else:  # smaller or larger than said, with the data to fit
        grown = rng.choice([-1, 1, 8])
        position = entry["data_offsets"][1]
        data = data[: max(0, position + min(grown, 0))] + b"\1" * max(grown, 0) + data[position:]
        for part in (p for n, p in header.items() if n != "__metadata__"):
            part["data_offsets"] = [o + grown * (o >= position) for o in part["data_offsets"]]
        entry["data_offsets"][0] -= grown * (entry["data_offsets"][0] >= position + grown)
        entry["shape"] = [entry["data_offsets"][1] - entry["data_offsets"][0]]
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    size = rng.choice([len(text)] * 20 + [0, len(text) - 1, 2**32, 2**63, 10**8 + 1])
    return size.to_bytes(8, "little") + text + data


def mutant(config: bytes, tensors: bytes, rng: random.Random) -> tuple[bytes, bytes]:
    """One folder's two files, with one to three changes."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        kind = rng.randrange(10)
        try:
            if kind < 4:
                document = json.loads(config)
                block = document["compression_config"]
                mutate_json(rng.choice([document, block, block["layers"], block["layers"]]), rng)
                config = json.dumps(document).encode("utf-8", "surrogatepass")
            elif kind == 4:
                config = mutate_bytes(config, rng)
            elif kind < 9:
                tensors = mutate_header(tensors, rng)
            else:
                tensors = mutate_bytes(tensors, rng)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
            break  # a mutant of a mutant that is no document any more
    return config, tensors


def parsed(raw: bytes) -> dict[str, Tensor]:
    """What a safetensors file says, by a reader of our own."""
    kinds = {"U8": torch.uint8, "I8": torch.int8, "I64": torch.int64, "F16": torch.float16,
             "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}  # fmt: skip
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            part = torch.frombuffer(data[start:end], dtype=torch.uint8) if end > start else None
            dtype = kinds[entry["dtype"]]
            flat = torch.empty(0, dtype=dtype) if part is None else part.clone().view(dtype)
            found[name] = flat.reshape(entry["shape"])
    return found


def assert_says_the_same(model: nn.Module, raw: bytes) -> None:
    """A loaded network holds exactly what the file says."""
    said = parsed(raw)
    units = dict(lego.lego_modules(model))
    for name, tensor in list_unique_tensors(model).items():
        owner, _, leaf = name.rpartition(".")
        expected = said[name]
        if owner in units and leaf == "index":
            shape = units[owner].lego_shape
            stream = np.unpackbits(expected.numpy(), bitorder="little")
            digits = stream[: shape.n_slots * shape.index_bits].reshape(shape.n_slots, -1)
            values = (digits.astype(np.int64) << np.arange(shape.index_bits)).sum(1)
            expected = torch.from_numpy(values).reshape(tensor.shape)
            assert int(tensor.max()) < shape.n_lego
        elif f"{owner}.lego_scales" in said and leaf == "lego_filters":
            scales = said[f"{owner}.lego_scales"].double().reshape(-1, 1, 1, 1)
            expected = expected.double() * scales
        elif f"{name}_scales" in said:
            scales = said[f"{name}_scales"].double()
            expected = expected.double() * scales.reshape(-1, *[1] * (expected.dim() - 1))
        found = tensor.detach()
        assert expected.shape == found.shape, name
        limit = torch.finfo(found.dtype).max if found.is_floating_point() else None
        if expected.dtype == torch.float64 and limit:
            expected = expected.clamp(-limit, limit)
        torch.testing.assert_close(
            found, expected.to(found.dtype), rtol=0, atol=0, equal_nan=True, msg=name
        )


watching: list[str] | None = None


def watch(event: str, args: tuple[Any, ...]) -> None:
    """Note what a loader must not do; an audit hook, which stays for the life of the process."""
    if watching is None:
        return
    written = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if written or event.startswith(FORBIDDEN):
        watching.append(f"{event} {args}"[:200])


@pytest.fixture(scope="module")
def watched() -> None:
    sys.addaudithook(watch)


@contextmanager
def confined() -> Iterator[list[str]]:
    """Bound memory for the while, and watch for what must not happen."""
    global watching
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + GROWTH
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    watching = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield watching
    finally:
        watching = None
        resource.setrlimit(resource.RLIMIT_AS, before)


class Slow(BaseException):
    """A mutant took longer than it may."""


def too_slow(*_: Any) -> None:
    raise Slow


@contextmanager
def in_time() -> Iterator[None]:
    before = signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def tiny(k: int, **settings: Any) -> nn.Module:
    model = Tiny().eval()
    nn.init.normal_(model.norm.running_mean)
    spec = lego.LegoSpec(m=0.5, o=2, k=k, linear=True, allow_expansion=True, **settings)
    return lego.convert_(model, lego.plan(model, spec, torch.zeros(1, 3, 8, 8)))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where the system has one, since each mutant is written there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        yield Path(place)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, bytes]]:
    """The two files of small valid folders: binary, int8, half in memory, shared banks."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("corpus")
    quantised = tiny(2)
    lego.quantize_(quantised, torch.randn(10, 3, 8, 8))
    models = [
        tiny(1, coefficients=False), tiny(2, dtype="int8"), tiny(1, dtype="fp16").half(), quantised,
    ]  # fmt: skip
    models.append(tiny(2, dtype="int8", share="network", rules=("b:o=5",)))
    assert [len(bank) for bank in lego_banks(models[-1])] == [1, 2]
    folders = [lego.save(model, place / str(n)) for n, model in enumerate(models)]
    return [
        ((f / "config.json").read_bytes(), (f / "model.safetensors").read_bytes()) for f in folders
    ]


def survive(
    folder: Path, files: tuple[bytes, bytes], load: Callable[[], nn.Module], seed: str
) -> str:
    """Load one mutant; tell whether it loaded or was refused, fail on anything else."""
    (folder / "config.json").write_bytes(files[0])
    (folder / "model.safetensors").write_bytes(files[1])
    with confined() as seen:
        try:
            with in_time():
                model = load()
        except LegoError as error:
            verdict = "refused" if str(error).strip() else "refused without a word"
        except (Exception, Slow) as error:
            raise AssertionError(f"mutant {seed} ended in {error!r}") from error
        else:
            verdict = "loaded"
        assert not seen, f"mutant {seed} did {seen}"
    if verdict == "loaded":
        assert_says_the_same(model, files[1])
    return verdict


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_mutants_load_to_what_they_say_or_are_refused(
    shard: int, corpus: list[tuple[bytes, bytes]], folder: Path, watched: None
) -> None:
    counts = {"loaded": 0, "refused": 0}
    for number in range(PER_SHARD):
        seed = f"{shard}/{number}"
        rng = random.Random(seed)
        files = mutant(*rng.choice(corpus), rng)
        counts[survive(folder, files, lambda: lego.load(folder, model=Tiny()), seed)] += 1
    assert counts["loaded"] > PER_SHARD / 50, counts  # else the mutants are too crude
    assert counts["refused"] > PER_SHARD / 2, counts


ARGUMENTS: list[Any] = [
    *HOSTILE, [10**6] * 4, [10**9], [65536] * 4, [2000, 2000, 2000, 2000], 65536, 10**5, [1] * 5000,
    ["bottleneck"], "deep", {"layers": [3]}, [[1, 2], [3]], 1e9, [0, 0, 0, 0], [-1, 1, 1, 1],
]  # fmt: skip
KEYS = [
    "layers", "channels", "num_classes", "in_chans", "output_stride", "cardinality", "drop_rate",
    "base_width", "stem_width", "stem_type", "block_reduce_first", "act_layer", "norm_layer",
    "aa_layer", "zero_init_last", "block_args", "features_only", "out_indices", "pretrained",
    "pretrained_cfg", "checkpoint_path", "depth_multiplier", "img_size", "depths", "dims",
    "global_pool", "widths", "avg_down", "replace_stem_pool",
]  # fmt: skip
ARCHITECTURES = [
    "resnet18", "resnet18", "resnet18", "convnext_atto", "efficientnet_b0", "regnety_002",
    "densenet121", "vit_tiny_patch16_224", "mobilevitv2_050", "../x", "", "repvgg_a0",
    "resnet18.a1_in1k", "hf-hub:timm/resnet18", "local-dir:/tmp",
]  # fmt: skip


@pytest.mark.slow
def test_hostile_architectures_and_arguments_are_refused(folder: Path, watched: None) -> None:
    sizes = {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]}
    model = lego.create("resnet18", pretrained=False, num_classes=3, model_args=sizes)
    spec = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec, torch.zeros(1, 3, 32, 32)))
    lego.save(model, folder / "valid")
    folder = folder / "valid"
    config = json.loads((folder / "config.json").read_text())
    tensors = (folder / "model.safetensors").read_bytes()
    counts = {"loaded": 0, "refused": 0}
    for number in range(REBUILT):
        rng = random.Random(number)
        document = copy.deepcopy(config)
        for _ in range(rng.choice([1, 1, 2])):
            document["model_args"][rng.choice(KEYS)] = copy.deepcopy(rng.choice(ARGUMENTS))
        document["architecture"] = rng.choice(ARCHITECTURES)
        document["compression_config"]["reparameterized"] = rng.random() < 0.2
        document["compression_config"]["library"] = rng.choice(["timm", "timm", "torchvision"])
        text = json.dumps(document).encode("utf-8", "surrogatepass")
        files = (text, tensors)
        counts[survive(folder, files, lambda: lego.load(folder), str(number))] += 1
    assert counts["refused"] > REBUILT / 2, counts
    assert counts["loaded"], counts
