"""Pushing, up to the boundary of the hub's library: what it would upload, and its model card."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from legocompress_cli.main import cli
from torch import nn

import legocompress as lego
from legocompress.errors import CheckpointError, OutputError, UsageError
from legocompress.export.hub_upload import model_card

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
    model: Any = lego.create("resnet18", pretrained=False, num_classes=10, model_args=sizes)
    model.pretrained_cfg = {**model.pretrained_cfg, "license": "apache-2.0"}
    spec = lego.LegoSpec(m=0.5, o=2, dtype="int8", allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec))
    return lego.save(model, tmp_path_factory.mktemp("push") / "folder")


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reaches the hub's library, in order."""
    calls: list[Any] = []

    def create(self: Any, repo_id: str, **settings: Any) -> Any:
        calls.append(("create", repo_id, self.token, settings))
        url = f"https://hub.test/{repo_id}"
        return type("Url", (str,), {"repo_id": repo_id})(url)

    def upload(self: Any, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        calls.append(("upload", repo_id, commit_message, files))
        return SimpleNamespace()

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "file_exists", lambda self, repo, name: repo == "me/has-a-card")
    return calls


def test_a_folder_is_pushed_with_its_card(folder: Path, uploaded: list[Any]) -> None:
    url = lego.push(folder, "me/small", private=True, message="hello", token="secret")
    assert url == "https://hub.test/me/small"
    create, upload = uploaded
    assert create == ("create", "me/small", "secret", {"private": True, "exist_ok": True})
    assert upload[:3] == ("upload", "me/small", "hello")
    files = upload[3]
    assert files.keys() == {"README.md", "config.json", "model.safetensors"}
    for name in ("config.json", "model.safetensors"):
        assert files[name] == (folder / name).read_bytes()
    assert files["README.md"].decode() == model_card(folder, "me/small")


def test_a_card_that_is_there_stays(folder: Path, uploaded: list[Any]) -> None:
    lego.push(folder, "me/has-a-card")
    assert uploaded[1][3].keys() == {"config.json", "model.safetensors"}


def test_the_card_says_what_the_report_says(folder: Path) -> None:
    text = model_card(folder, "me/small")
    card = ModelCard(text)
    assert card.data.library_name == "legocompress"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "image-classification"
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["legocompress", "timm"]
    totals = lego.measure(lego.load(folder), path=folder).totals()
    stored = sum(path.stat().st_size for path in folder.iterdir())
    assert f"| {totals['dense_bits'] / 8 / stored:.2f}x |" in text
    assert f"{totals['params'] / 1e6:.2f}M" in text
    assert f"{totals['macs'] / 1e9:.2f}G" in text
    assert "m=0.5, o=2, k=1, filters in int8" in text
    assert 'lego.load("hf-hub:me/small")' in text
    assert "random, seed 0" in text


def test_a_network_of_ones_own_says_what_load_needs(tmp_path: Path) -> None:
    def mine() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3))

    spec = lego.LegoSpec(m=0.5, o=2, allow_expansion=True)
    path = lego.save(lego.convert_(mine(), lego.plan(mine(), spec)), tmp_path / "mine")
    assert "model=YourNetwork()" in model_card(path, "me/mine", mine())
    with pytest.raises(CheckpointError, match="fresh dense instance"):
        model_card(path, "me/mine")


def test_nothing_damaged_leaves(tmp_path: Path, folder: Path, uploaded: list[Any]) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        lego.push(tmp_path, "me/small")
    assert uploaded == []


def test_what_the_hub_refuses_is_told(
    folder: Path, uploaded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(error: Exception) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(HfApi, "create_repo", fail)

    refuse(HFValidationError("Repo id must be in the form"))
    with pytest.raises(UsageError, match="not the name of a repository"):
        lego.push(folder, "a/b/c")
    refuse(PermissionError("401 Client Error.\nmore"))
    with pytest.raises(OutputError, match=r"401 Client Error.\. Log in with `hf auth login`"):
        lego.push(folder, "me/small")


def test_the_command(folder: Path, uploaded: list[Any]) -> None:
    run = CliRunner().invoke
    told = run(cli, ["push", str(folder), "me/small", "--dry-run"], catch_exceptions=False)
    assert told.output == model_card(folder, "me/small")
    assert uploaded == []
    told = run(cli, ["push", str(folder), "me/small"], catch_exceptions=False)
    assert told.output == f"{folder} -> https://hub.test/me/small\n"
    told = run(
        cli,
        ["push", str(folder), "me/small", "--private", "--message", "x", "--json"],
        catch_exceptions=False,
    )
    assert yaml.safe_load(told.output) == {"url": "https://hub.test/me/small"}
    assert uploaded[-1][2] == "x"
    assert uploaded[-2][3]["private"] is True
