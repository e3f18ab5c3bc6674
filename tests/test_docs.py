"""Every code block of README and docs runs, and every command and option is documented."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import timm
import torch
import torchvision
from legocompress_cli.main import cli
from PIL import Image
from safetensors.torch import save_file

from tests.test_rooms import ROOMS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMALL = "test_resnet"
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A user's folder: photos, a weights file, and a hub cache as a download leaves it."""
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(12):
        pixels = generator.integers(0, 256, (80, 100, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    squeezenet = torchvision.models.squeezenet1_1(num_classes=10)
    torch.save(squeezenet.state_dict(), tmp_path / "squeezenet.pth")
    return tmp_path


def fill_hub_cache(home: Path, name: str) -> None:
    """Put random weights where a download of `name` would have put the trained ones."""
    repo = timm.get_pretrained_cfg(name).hf_hub_id
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123")
    (folder / "snapshots" / "0123").mkdir(parents=True)
    torch.manual_seed(0)
    save_file(timm.create_model(name).state_dict(), folder / "snapshots/0123/model.safetensors")


def replace_large(code: str) -> str:
    """Put a small ResNet of timm for ResNet-50, which takes a quarter of an hour to calibrate."""
    return code.replace("resnet50", SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_code_blocks_run(page: Path, place: Path) -> None:
    if "resnet50" in "".join(code for _, code in blocks(page)):
        fill_hub_cache(place / "hf", SMALL)
    environment = {
        **os.environ,
        "HF_HOME": str(place / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    codes = [(language, replace_large(code)) for language, code in blocks(page)]
    shell = "\n".join(code for language, code in codes if language == "bash")
    python = "\n".join(code for language, code in codes if language == "python")
    for command in (["bash", "-euo", "pipefail", "-c", shell], [sys.executable, "-c", python]):
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_and_option_is_documented() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    missing = []
    for name, command in cli.commands.items():
        if f"## `{name}" not in text:
            missing.append(name)
        for option in command.params:
            if isinstance(option, click.Option) and not any(o in text for o in option.opts):
                missing.append(f"{name} {option.opts}")
    assert not missing


def test_the_command_line_reference_is_made_of_all_commands() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    (module,) = re.findall(r"^    :module: (\S+)$", text, re.MULTILINE)
    (name,) = re.findall(r"^    :command: (\S+)$", text, re.MULTILINE)
    assert getattr(importlib.import_module(module), name) is cli
    for command in cli.commands.values():
        assert command.help, command.name
        options = [option for option in command.params if isinstance(option, click.Option)]
        assert [option.name for option in options if not option.help] == []


def test_the_readme_has_exactly_two_set_up_commands() -> None:
    commands = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == ["demo", "test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def anchors(page: Path) -> set[str]:
    """The anchors that a forge gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_lead_to_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text())
    targets = [(page.parent / name if name else page, anchor) for name, anchor in links]
    assert [anchor for target, anchor in targets if anchor not in anchors(target)] == []


def test_long_pages_stay_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 150


def test_the_architecture_lists_every_room_in_order() -> None:
    table = re.findall(r"^\| `([\w./]+)` \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    rooms = [name.removesuffix("/").removesuffix(".py") for name in table]
    assert rooms == [*ROOMS, "__init__", "cli"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    name = r"(?:legocompress|cli|tests|recipes|benchmarks)/[\w./-]+"
    paths = re.findall(rf"`({name})`|python ({name})", page.read_text())
    assert [path for path in map("".join, paths) if not (ROOT / path).exists()] == []
