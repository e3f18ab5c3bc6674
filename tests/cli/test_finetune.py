"""`finetune` and `recipes` on the command line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from legocompress_cli.finetune import _events
from legocompress_cli.main import main

import legocompress as lego
from legocompress.errors import UsageError
from legocompress.finetune.recipe import shipped_recipes
from tests.support.tiny import compressed, dense, recipe, write_images

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in this process, in a folder with a network, images and a recipe."""
    monkeypatch.chdir(tmp_path)
    lego.save(compressed(), "net")
    write_images(tmp_path / "images.npz")
    stages = [{"epochs": 1}]
    text = yaml.safe_dump(recipe(stages=stages).model_dump(mode="json"))
    (tmp_path / "r.yaml").write_text(text)

    def run_command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["legocompress", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        return (code, *capsys.readouterr())

    return run_command


USUAL = ["finetune", "net", "--recipe", "r.yaml", "--data-dir", "images.npz"]


def test_the_usual_way(run: Run) -> None:
    code, out, err = run(*USUAL)
    assert code == 0, err
    assert "Next: legocompress report net-ft/best" in out
    assert re.search(r"epoch 1/1  loss \d\.\d+  top-1 .* indices changed", err)
    assert run("report", "net-ft/best")[0] == 0
    noted = yaml.safe_load(Path("net-ft/args.yaml").read_text())
    assert (noted["checkpoint"], noted["data_dir"], noted["processes"]) == ("net", "images.npz", 1)
    code, out, err = run(*USUAL)
    assert code == 2
    assert "--resume" in err
    code, out, err = run(*USUAL, "--resume")
    assert code == 0
    assert "done already" in out


def test_json_is_the_only_output(run: Run) -> None:
    code, out, err = run(*USUAL, "--json", "--out", "x", "--num-classes", "5", "--workers", "1")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["out"] == "x"
    assert found["epochs"][0]["progress"]["epoch"] == 1
    assert lego.load("x/best").fc.out_features == 5  # type: ignore[union-attr]


def test_the_original_by_name_and_by_weights(run: Run) -> None:
    from safetensors.torch import save_file

    save_file(dense().state_dict(), "dense.safetensors")
    code, _, err = run(*USUAL, "--set", "distill.logits=1")
    assert code == 2
    assert "--original" in err
    distils = [*USUAL, "--set", "distill.labels=0", "--force"]
    assert run(*distils, "--original-weights", "dense.safetensors")[0] == 0
    assert run(*distils, "--original", "net")[0] == 0


def test_the_original_that_the_checkpoint_names(run: Run, tmp_path: Path) -> None:
    """The shipped network: a few updates on its own images, without labels."""
    demo = Path(lego.__file__).parent / "demo"
    assert run("convert", demo / "fashion-resnet", "--out", "shipped")[0] == 0
    code, _, err = run(
        "finetune", "shipped", "--recipe", "demo", "--data-dir", demo / "fashion-calibration.npz",
        "--set", "data.holdout=480", "--set", "batch_size=16", "--set", "stages=[{epochs: 1}]",
        "--set", "schedule.warmup_epochs=0",
    )  # fmt: skip
    assert code == 0, err
    assert "agreement" in err
    assert lego.load("shipped-ft/last").lego_record.recipe is not None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["finetune", "nowhere", *USUAL[2:]], 2, "'nowhere' is not a compressed folder"),
        ([*USUAL[:2], "--recipe", "no", *USUAL[4:]], 2, "shipped are"),
        ([*USUAL, "--set", "optimizer.lrr=1"], 2, "did you mean 'lr'?"),
        ([*USUAL, "--set", "batch_size=99"], 2, "--set batch_size=20"),
        ([*USUAL[:4], "--data-dir", "nothing"], 1, "no train images under 'nothing'"),
        ([*USUAL, "--device", "cuda:77"], 2, "cannot be used here"),
        ([*USUAL, "--set", "optimizer.lr=1e30"], 1, "Lower the rate"),
        ([*USUAL, "--set", "norm_stats=frozen", "--set", "data.holdout=0"], 1, "boolean 'test'"),
    ],
)
def test_every_fault_is_one_sentence(words: list[str], code: int, told: str, run: Run) -> None:
    ended, out, err = run(*words)
    assert ended == code, err
    assert out == ""
    assert re.fullmatch(r"Error: [^\n]+\n", err), err
    assert told in err


def test_recipes_are_listed_and_shown(run: Run) -> None:
    code, out, _ = run("recipes")
    assert code == 0
    assert all(name in out for name in shipped_recipes())
    code, out, _ = run("recipes", "fashion-mnist")
    assert lego.Recipe(**yaml.safe_load(out)) == lego.load_recipe("fashion-mnist")
    code, out, _ = run("recipes", "--json")
    assert sorted(json.loads(out)) == shipped_recipes()
    code, out, _ = run("recipes", "demo", "--json")
    assert json.loads(out)["stages"][0]["epochs"] == 6
    assert run("recipes", "none")[0] == 2


def test_tensorboard(run: Run) -> None:
    pytest.importorskip("tensorboard")
    code, _, err = run(*USUAL, "--tensorboard")
    assert code == 0, err
    assert list(Path("net-ft/tensorboard").iterdir())


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UsageError, match=r"legocompress\[tensorboard\]"):
        _events(tmp_path)
