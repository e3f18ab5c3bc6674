"""`finetune` on the command line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

import legocompress as lego
from tests.support.command_line import DEMO, Run, check_error
from tests.support.tiny import compressed, dense, recipe, write_images


@pytest.fixture(autouse=True)
def inputs(run: Run, tmp_path: Path) -> None:
    """A network, images and a recipe in the folder where the command runs."""
    lego.save(compressed(), "net")
    write_images(tmp_path / "images.npz")
    text = yaml.safe_dump(recipe(stages=[{"epochs": 1}]).model_dump(mode="json"))
    (tmp_path / "r.yaml").write_text(text)


FINETUNE = ["finetune", "net", "--recipe", "r.yaml", "--data-dir", "images.npz"]


@pytest.mark.slow
def test_a_run_with_the_default_options(run: Run) -> None:
    code, out, err = run(*FINETUNE)
    assert code == 0, err
    assert "Next: legocompress report net-ft/best" in out
    assert re.search(r"epoch 1/1  loss \d\.\d+  top-1 .* indices changed", err)
    assert run("report", "net-ft/best")[0] == 0
    run_args = yaml.safe_load(Path("net-ft/args.yaml").read_text())
    assert run_args["checkpoint"] == "net"
    assert run_args["data_dir"] == "images.npz"
    assert run_args["processes"] == 1
    code, out, err = run(*FINETUNE)
    assert code == 2
    assert "--resume" in err
    code, out, err = run(*FINETUNE, "--resume")
    assert code == 0
    assert "done already" in out


def test_json_is_the_only_output(run: Run) -> None:
    code, out, err = run(*FINETUNE, "--json", "--out", "x", "--num-classes", "5", "--workers", "1",
                         "--log-json", "log.jsonl")  # fmt: skip
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert {line["event"] for line in lines} == {"start", "progress", "metrics"}
    assert lines[-1]["step"] == 1
    printed = json.loads(out)
    assert printed["out"] == "x"
    assert lines[-1]["metrics"]["eval/top1"] == printed["epochs"][0]["top1"]
    assert printed["epochs"][0]["progress"]["epoch"] == 1
    assert lego.load("x/best").fc.out_features == 5  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_original_by_name_and_by_weights(run: Run) -> None:
    from safetensors.torch import save_file

    save_file(dense().state_dict(), "dense.safetensors")
    code, _, err = run(*FINETUNE, "--set", "distill.logits=1")
    assert code == 2
    assert "--original" in err
    distils = [*FINETUNE, "--set", "distill.labels=0", "--force"]
    assert run(*distils, "--original-weights", "dense.safetensors")[0] == 0
    assert run(*distils, "--original", "net")[0] == 0


@pytest.mark.slow
def test_the_original_that_the_checkpoint_records(run: Run) -> None:
    """The shipped network: a few updates on its own images, without labels."""
    assert run("convert", DEMO / "fashion-resnet", "--out", "shipped")[0] == 0
    code, _, err = run(
        "finetune", "shipped", "--recipe", "demo", "--data-dir", DEMO / "fashion-calibration.npz",
        "--set", "data.holdout=480", "--set", "batch_size=16", "--set", "stages=[{epochs: 1}]",
        "--set", "schedule.warmup_epochs=0",
    )  # fmt: skip
    assert code == 0, err
    assert "agreement" in err
    assert lego.lego_state(lego.load("shipped-ft/last")).conversion.recipe is not None  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["finetune", "nowhere", *FINETUNE[2:]], 2, "'nowhere' is not a compressed folder"),
        ([*FINETUNE[:2], "--recipe", "no", *FINETUNE[4:]], 2, "shipped are"),
        ([*FINETUNE, "--set", "optimizer.lrr=1"], 2, "did you mean 'lr'?"),
        ([*FINETUNE, "--set", "batch_size=99"], 2, "--set batch_size=20"),
        ([*FINETUNE[:4], "--data-dir", "nothing"], 1, "no train images under 'nothing'"),
        ([*FINETUNE, "--device", "cuda:77"], 2, "cannot be used here"),
        ([*FINETUNE, "--set", "optimizer.lr=1e30"], 1, "Lower the rate"),
        ([*FINETUNE, "--set", "norm_stats=frozen", "--set", "data.holdout=0"], 1, "boolean 'test'"),
    ],
)
def test_every_fault_is_one_sentence(words: list[str], code: int, message: str, run: Run) -> None:
    check_error(run(*words), code, message)


def test_a_logger_that_is_not_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_error(run(*FINETUNE, "--log-to", "wandb"), 2, "pip install 'legocompress[wandb]'")
    assert not Path("net-ft").exists()


def test_tensorboard(run: Run) -> None:
    pytest.importorskip("tensorboard")
    code, _, err = run(*FINETUNE, "--tensorboard")
    assert code == 0, err
    assert list(Path("net-ft/tensorboard").iterdir())
