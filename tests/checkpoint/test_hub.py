"""Compressed folders by hub name, out of the hub's own cache: no network is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.errors
import pytest
import torch
from click.testing import CliRunner
from legocompress_cli.main import cli

import legocompress as lego
from legocompress.checkpoint import hub
from legocompress.errors import CheckpointError, UsageError, WeightsError

SMALL: dict[str, Any] = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
REPO = "hf-hub:somebody/small-lego"


def small() -> Any:
    model = lego.create("resnet18", pretrained=False, num_classes=10, model_args=SMALL)
    spec = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)
    return lego.convert_(model, lego.plan(model, spec, torch.zeros(1, 3, 32, 32)))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A compressed network that stands in the hub's cache as a download leaves it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--somebody--small-lego"
    network = small()
    lego.save(network, place / "snapshots" / "0123")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123")
    (place / "refs" / "v1").write_text("0123")
    return network


def test_a_network_loads_by_its_hub_name(model: Any) -> None:
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for name in (REPO, f"{REPO}@v1", "hf_hub:somebody/small-lego"):
            assert torch.equal(lego.load(name)(x), expected)
            assert torch.equal(lego.open_model(name)(x), expected)
    with pytest.raises(UsageError, match="takes no num_classes"):
        lego.open_model(REPO, num_classes=3)


def test_commands_take_hub_names(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    told = run(cli, ["report", REPO], catch_exceptions=False)
    stored = sum(f.stat().st_size for f in tmp_path.glob("hub/*/snapshots/0123/*"))
    assert f"{stored / 1e3:.2f} kB" in told.output
    run(cli, ["export", f"{REPO}@v1"], catch_exceptions=False)
    assert Path("small-lego-v1-dense.safetensors").is_file()


def test_a_network_that_is_not_compressed_is_left_to_the_library(
    model: Any, tmp_path: Path
) -> None:
    (folder,) = (tmp_path / "hub").glob("*/snapshots/0123")
    plain = lego.export_timm(small(), tmp_path / "plain")
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    found = lego.open_model(REPO)
    assert not any(True for _ in lego.lego_modules(found))
    with pytest.raises(CheckpointError, match="no compression_config"):
        lego.load(REPO)


def test_what_cannot_be_had_is_told(model: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config.json on the hub, or the hub cannot be"):
        lego.load("hf-hub:somebody/else")
    with pytest.raises(CheckpointError, match=r"no config.json on the hub, or the hub cannot be"):
        lego.load(f"{REPO}@v2")  # the cache has another revision only
    with pytest.raises(UsageError, match="not of the form hf-hub:USER/REPO"):
        lego.load("hf-hub:no/such/name")
    with pytest.raises(WeightsError, match="no model configuration"):
        lego.open_model("hf-hub:somebody/else")
    (config,) = (tmp_path / "hub").glob("*/snapshots/0123/config.json")
    (config.parent / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model.safetensors on the hub"):
        lego.load(REPO)


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (ConnectionError("no route\nat all"), "cannot be fetched: no route"),
        (TimeoutError(), "cannot be fetched: TimeoutError"),
        (OSError(28, "No space left on device"), "cannot be fetched: .*No space left"),
        (PermissionError(13, "Permission denied"), "cannot be fetched: .*Permission denied"),
    ],
)
def test_errors_of_the_network_are_one_sentence(
    error: Exception, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=match) as caught:
        lego.load(REPO)
    assert "\n" not in str(caught.value)


def test_a_read_only_cache_is_enough(model: Any, tmp_path: Path) -> None:
    places = [path for path in (tmp_path / "hub").rglob("*") if path.is_dir()]
    for place in places:
        place.chmod(0o555)
    try:
        assert torch.equal(lego.load(REPO).state_dict()["fc.bias"], model.state_dict()["fc.bias"])
    finally:
        for place in places:
            place.chmod(0o755)
