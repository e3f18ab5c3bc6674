"""What every test shares: a fixed seed, and one thread, since small tensors run slower on more.

The processes that tests start get one thread, too: several tests run at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"
# OpenVINO sends no telemetry then, for which it would fork this process from threads.
os.environ.setdefault("CI", "true")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Run code in an environment with all that is installed here except this package."""
    place = tmp_path_factory.mktemp("elsewhere")
    venv.create(place / "venv", with_pip=False, symlinks=True)
    links = place / "links"
    links.mkdir()
    for folder in map(Path, reversed([p for p in sys.path if p.endswith("site-packages")])):
        for entry in folder.iterdir():
            if "legocompress" in entry.name or entry.suffix == ".pth":
                continue
            (links / entry.name).unlink(missing_ok=True)
            (links / entry.name).symlink_to(entry)
    purelib = sysconfig.get_path("purelib", vars={"base": str(place / "venv")})
    Path(purelib, "links.pth").write_text(f"{links}\n")

    def run(code: str) -> str:
        check = (
            "import importlib.util\nassert importlib.util.find_spec('legocompress') is None\n"
            "import torch\ntorch.set_num_threads(1)\n"
        )
        done = subprocess.run(
            [place / "venv" / "bin" / "python", "-I", "-W", "ignore", "-c", check + code],
            cwd=place,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
