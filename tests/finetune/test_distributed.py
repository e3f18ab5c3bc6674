"""Several processes compute the same as one; torchrun restarts one that died."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import legocompress as lego
from legocompress.finetune.distributed import (
    Processes,
    agree_on_store,
    has_restarted,
    read_processes,
)
from legocompress.finetune.loop import finetune_
from legocompress.lego.module import lego_modules
from tests.support.tiny import compressed, recipe, write_images

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Forks two processes that join over gloo; starting Python twice would take longer.
DRIVER = """
import os, sys
import torch
torch.set_num_threads(1)
import legocompress as lego
from legocompress.finetune.distributed import join_process_group, read_processes
from legocompress.finetune.loop import finetune_
from tests.support.tiny import compressed, recipe

place, changes = sys.argv[1], eval(sys.argv[2])
model = compressed(k=2)

def train():
    settings = recipe(**changes)
    data = lego.open_training(model, settings, f"{place}/images.npz")
    processes = read_processes()
    with join_process_group(processes, torch.device("cpu")):
        finetune_(model, settings, *data, out=f"{place}/two", processes=processes)
    torch.save(model.state_dict(), f"{place}/rank{processes.rank}.pt")

os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[3])
children = []
for rank in range(2):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    pid = os.fork()
    if not pid:
        code = 1
        try:
            train()
            code = 0
        finally:
            os._exit(code)
    children.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
"""
# Trains in two processes, then again with a kill of one of them, and then resumes that run.
KILLING_DRIVER = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import legocompress as lego
from legocompress.finetune.distributed import join_process_group, read_processes
from legocompress.finetune.loop import finetune_
from tests.support.tiny import compressed, recipe

place, stages, ports = sys.argv[1], eval(sys.argv[2]), sys.argv[3:]

def train(name, victim, resume):
    model, settings = compressed(k=2), recipe(save_every=1, stages=stages)
    data = lego.open_training(model, settings, f"{place}/images.npz")
    processes = read_processes()

    def on_step(progress):
        if (processes.rank, progress.update) == (victim, 3):
            os.kill(os.getpid(), signal.SIGKILL)

    with join_process_group(processes, torch.device("cpu")):
        finetune_(model, settings, *data, out=f"{place}/{name}", processes=processes,
                  resume=resume, on_step=on_step)

def train_both(port, *args):
    os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    children = []
    for rank in range(2):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        children.append(os.fork())
        if not children[-1]:
            code = 1
            try:
                train(*args)
                code = 0
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]

assert train_both(ports[0], "whole", None, False) == [0, 0]
assert train_both(ports[1], "killed", 1, False) == [1, -signal.SIGKILL]
assert os.path.exists(f"{place}/killed/state.pt") and not os.path.exists(f"{place}/killed/last")
assert train_both(ports[2], "killed", None, True) == [0, 0]
"""
STAGES = [{"epochs": 1, "rates": {"proxies": 300.0}}, {"epochs": 1, "indices": "frozen"}]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train_in_two_processes(place: Path, changes: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Train in two processes, and return the state dict that each ends with."""
    command = [sys.executable, "-W", "ignore", "-c", DRIVER, str(place), repr(changes)]
    ran = subprocess.run(
        [*command, str(free_port())], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    return [torch.load(place / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def train_in_one_process(place: Path, changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Train in this process, and return the state dict."""
    model, settings = compressed(k=2), recipe(**changes)
    data = lego.open_training(model, settings, f"{place}/images.npz")
    finetune_(model, settings, *data, out=place / "one")
    return model.state_dict()


def check_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], but: str = "none") -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if value.is_floating_point() and but not in name:
            torch.testing.assert_close(value, b[name], rtol=2e-3, atol=2e-4, msg=name)
        elif not value.is_floating_point() and "num_batches" not in name:
            assert torch.equal(value, b[name]), name


@pytest.mark.slow
def test_two_processes_equal_one_at_the_same_batch(tmp_path: Path) -> None:
    """With running statistics: those of a batch would differ from those of its halves."""
    write_images(tmp_path / "images.npz")
    changes = {"stages": STAGES, "norm_stats": "frozen", "balance": 0.01, "clip": {"value": 1.0},
               "ema": {"decay": 0.9}}  # fmt: skip
    ranks = train_in_two_processes(tmp_path, changes)
    for name in ranks[0]:
        assert torch.equal(ranks[0][name], ranks[1][name]), name
    single = train_in_one_process(tmp_path, changes)
    check_close(ranks[0], single)
    before = compressed(k=2)
    moved = [not torch.equal(single[f"{name}.index"], m.index) for name, m in lego_modules(before)]
    assert any(moved)
    rows = [(tmp_path / name / "summary.csv").read_text().splitlines() for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 3
    for row, other_row in zip(*rows, strict=True):
        for a, b in zip(row.split(","), other_row.split(","), strict=True):
            assert a == b or float(a) == pytest.approx(float(b), rel=1e-3)


@pytest.mark.slow
def test_two_processes_equal_one_that_accumulates_two_parts(tmp_path: Path) -> None:
    """With each part's statistics. Running statistics, which training does not use, may differ."""
    write_images(tmp_path / "images.npz")
    ranks = train_in_two_processes(tmp_path, {"stages": STAGES})
    for name in ranks[0]:
        assert torch.equal(ranks[0][name], ranks[1][name]), name
    check_close(
        ranks[0],
        train_in_one_process(tmp_path, {"stages": STAGES, "accumulate": 2}),
        but="running_",
    )


@pytest.mark.slow
def test_torchrun_starts_a_dead_process_again(tmp_path: Path) -> None:
    write_images(tmp_path / "images.npz")
    lego.save(compressed(), tmp_path / "net")
    (tmp_path / "r.yaml").write_text(
        json.dumps(recipe(save_every=1, stages=[{"epochs": 6}]).model_dump(mode="json"))
    )
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node",
               "2", "--max-restarts", "2", "--monitor-interval", "0.2", "--standalone",
               "-m", "legocompress_cli", "finetune", "net", "--recipe", "r.yaml",
               "--data-dir", "images.npz", "--device", "cpu"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            state = tmp_path / "net-ft" / "state.pt"
            deadline = time.monotonic() + 200
            while not state.exists() and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            victim = _find_child(run.pid)
            os.kill(victim, signal.SIGKILL)
            assert run.wait(timeout=120) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    assert "SIGKILL" in (tmp_path / "log").read_text() or "-9" in (tmp_path / "log").read_text()
    rows = (tmp_path / "net-ft" / "summary.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1", "2", "3", "4", "5"]
    lego.load(tmp_path / "net-ft" / "best")


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_exactly_after_one_was_killed(tmp_path: Path) -> None:
    write_images(tmp_path / "images.npz")
    stages = [{"epochs": 1, "rates": {"proxies": 300.0}}]
    ports = [str(free_port()) for _ in range(3)]
    command = [sys.executable, "-W", "ignore", "-c", KILLING_DRIVER, str(tmp_path), repr(stages)]
    ran = subprocess.run([*command, *ports], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    for name in ("summary.csv", "last/model.safetensors", "best/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def _find_child(parent: int) -> int:
    """Find a process that `parent` started to train."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            stat = (place / "stat").read_text().rpartition(")")[2].split()
            words = (place / "cmdline").read_text()
        except OSError:
            continue
        if int(stat[1]) == parent and "finetune" in words:
            return int(place.name)
    raise AssertionError("no process found")


def test_the_environment_of_torchrun_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert read_processes() == Processes(0, 1, 0)
    assert not has_restarted()
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert read_processes() == Processes(5, 8, 1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert has_restarted()


def test_a_single_process_sums_its_own_values() -> None:
    assert Processes().sum(1, 2.5) == [1, 2.5]
    assert Processes().first


def test_processes_agree_on_a_store_that_holds_entries_of_earlier_ones() -> None:
    store, patience = torch.distributed.HashStore(), timedelta(seconds=20)  # type: ignore[attr-defined]

    def start(word: str) -> None:
        with ThreadPoolExecutor(3) as pool:
            late = pool.submit(lambda: (time.sleep(0.2), agree_on_store(store, 2, 3, patience))[1])
            parts = [pool.submit(agree_on_store, store, rank, 3, patience) for rank in (0, 1)]
            first, *others = [part.result() for part in (*parts, late)]
        assert not first.check(["said"])  # nothing of an earlier start
        first.set("said", word)
        assert [other.get("said") for other in others] == [word.encode()] * 2

    start("one")
    start("two")
    for rank in (0, 1):  # no other process starts
        with pytest.raises(RuntimeError):
            agree_on_store(store, rank, 3, timedelta(seconds=0.3))
