"""A calibration that is killed at any layer goes on there and ends with the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Imports once, then forks: each child calibrates, and is killed while it repairs a layer.
DRIVER = """
import copy, os, pathlib, random, signal, sys, time
import torch
torch.set_num_threads(1)
import legocompress as lego
from legocompress.calibrate.journal import hash_tensors

place = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
original = lego.create("resnet10t", pretrained=False, num_classes=5)
model = copy.deepcopy(original)
lego.convert_(model, lego.plan(model, lego.LegoSpec(only=["layer[12].*"], k=2)))
images = torch.randn(20, 3, 32, 32)

def child(name):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            student = copy.deepcopy(model)
            record = lego.calibrate_(student, original, images, epochs=1, journal=place / name)
            told = hash_tensors(*student.state_dict().values()) + record.model_dump_json()
            (place / f"{name}.txt").write_text(told)
            code = 0
        finally:
            os._exit(code)
    return pid

assert os.waitpid(child("whole"), 0)[1] == 0
n_layers = len(list((place / "whole").iterdir()))
draw = random.Random(0)
for n_done in range(n_layers):
    pid = child("killed")
    while len(list((place / "killed").glob("*.safetensors"))) <= n_done:
        assert os.waitpid(pid, os.WNOHANG)[0] == 0, "it ended before it was killed"
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.05))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if len(list((place / "killed").glob("*.safetensors"))) == n_layers:
        break
assert os.waitpid(child("killed"), 0)[1] == 0
print(n_layers, n_done + 1)
"""


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    words = [sys.executable, "-W", "ignore", "-c", DRIVER, str(tmp_path)]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert ran.returncode == 0, ran.stderr
    n_layers, kills = map(int, ran.stdout.split())
    assert n_layers >= 4
    assert kills >= 2
    assert (tmp_path / "killed.txt").read_text() == (tmp_path / "whole.txt").read_text()
