"""A run that is killed again and again ends with the same bytes as an undisturbed one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import write_images

ROOT = Path(__file__).parents[2]
# Imports once, then forks. Each child trains and is killed at a random moment.
DRIVER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import legocompress as lego
from legocompress.finetune.loop import finetune_
from tests.support.tiny import compressed, dense, recipe

model, teacher = compressed(k=2), dense()
place, changes, workers, seed = sys.argv[1], eval(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def train(out, resume):
    settings = recipe(save_every=3, **changes)
    data = lego.open_training(model, settings, f"{place}/images.npz")
    finetune_(model, settings, *data, original=teacher, out=f"{place}/{out}", resume=resume,
              workers=workers)

def child(*args):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            train(*args)
            code = 0
        finally:
            os._exit(code)
    return pid

started = time.perf_counter()
assert os.waitpid(child("whole", False), 0)[1] == 0
whole = time.perf_counter() - started
draw = random.Random(int(seed))
kills = 0
while kills < 40:
    pid = child("killed", True)
    time.sleep(draw.uniform(0, 0.35 * whole) + 0.1 * (kills > 30) * whole)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.waitstatus_to_exitcode(status) == 0:
        break
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
    kills += 1
else:
    assert os.waitpid(child("killed", True), 0)[1] == 0
print("killed", kills, "times")
"""
FULL = {
    "stages": [{"epochs": 1, "rates": {"proxies": 300.0}}, {"epochs": 1, "indices": "frozen"}],
    "ema": {"decay": 0.9},
    "mixup": {"mixup": 0.2, "cutmix": 1.0},
    "distill": {"features": 0.1},
    "augment": {"crop": "shift", "auto_augment": "rand-m3", "re_prob": 0.2},
    "schedule": {"warmup_epochs": 1},
}
MUON = {"optimizer": {"name": "nmuon", "lr": 0.003}, "stages": [{"epochs": 2}], "amp": "bf16"}
ADAM = {"optimizer": {"name": "adamw", "lr": 0.003}, "stages": [{"epochs": 1}]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "workers"), [(FULL, 0), (MUON, 0), (ADAM, 2)], ids=["full", "muon", "workers"]
)
def test_a_run_killed_at_random_ends_the_same(
    changes: dict[str, object], workers: int, tmp_path: Path
) -> None:
    write_images(tmp_path / "images.npz")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        DRIVER,
        str(tmp_path),
        repr(changes),
        str(workers),
    ]
    ran = subprocess.run([*command, "1"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert int(ran.stdout.split()[1]) >= 3
    check_same_files(tmp_path / "whole", tmp_path / "killed")


def check_same_files(one: Path, other: Path) -> None:
    """Check that all files of two runs have the same bytes, and their saved states equal values."""
    import torch

    names = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    assert len(names) == 7
    for name in names:
        if name.name == "state.pt":
            states = [torch.load(place / name, weights_only=True) for place in (one, other)]
            check_equal(*states)
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def check_equal(a: object, b: object) -> None:
    """Check that two nested values are equal, tensors included."""
    import torch

    assert type(a) is type(b)
    if isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in a:
            check_equal(a[key], b[key])
    elif isinstance(a, list) and isinstance(b, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            check_equal(one, other)
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b
