"""A shared bank is stored once, and tampered names of banks end in one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import legocompress as lego
from legocompress.lego.module import lego_banks
from tests.support.folders import (
    TENSORS,
    assert_same,
    digest,
    edit_config,
    edit_tensors,
    refused,
    small,
)

OWNER, MEMBER = "layer1.0.conv1", "layer3.0.conv1"


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_loading_undoes_saving_with_shared_banks(dtype: str, tmp_path: Path) -> None:
    model = small(share="network", k=2, dtype=dtype)
    lego.save(model, tmp_path / "a")
    stored = load_file(tmp_path / "a" / TENSORS)
    banks = {name for name in stored if name.endswith("lego_filters")}
    assert banks == {f"{bank[0][0]}.lego_filters" for bank in lego_banks(model)}
    loaded = lego.load(tmp_path / "a")
    assert_same(model, loaded, torch.randn(2, 3, 32, 32))
    assert [len(b) for b in lego_banks(loaded)] == [len(b) for b in lego_banks(model)]
    lego.save(loaded, tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_folder_without_shared_banks_has_the_keys_of_the_first_version(tmp_path: Path) -> None:
    model = small(rules=("layer1.*:k=2",))
    text = (lego.save(model, tmp_path / "a") / "config.json").read_text()
    block = json.loads(text)["compression_config"]
    assert block["format_version"] == 1
    assert '"bank"' not in text
    assert '"share"' not in text
    assert_same(model, lego.load(tmp_path / "a"), torch.randn(2, 3, 32, 32))


def test_tampered_banks_are_refused(tmp_path: Path) -> None:
    lego.save(small(share="network", k=2), tmp_path / "a")
    original = (tmp_path / "a" / "config.json").read_text()

    def attempt(match: str, block: dict[str, Any] | None = None, **units: dict[str, Any]) -> None:
        def edit(config: dict[str, Any]) -> None:
            config["compression_config"].update(block or {})
            for key, changes in units.items():
                name = OWNER if key == "owner" else MEMBER
                config["compression_config"]["layers"][name].update(changes)

        edit_config(tmp_path / "a", edit)
        assert "layer" in refused(tmp_path / "a", match)
        (tmp_path / "a" / "config.json").write_text(original)

    attempt("is no Lego layer", member={"bank": "conv1"})
    attempt("is no Lego layer", member={"bank": ""})
    attempt("bank", member={"bank": 5})
    attempt("stores no bank itself", member={"bank": MEMBER})
    attempt("stores no bank itself", owner={"bank": MEMBER})  # a circle
    attempt("stores no bank itself", member={"bank": "layer3.0.conv2"})  # a chain
    attempt("do not fit", member={"bank": None})
    attempt("n_lego|needs", member={"bank": "layer1.0.downsample.0"})
    attempt("n_lego", member={"n_lego": 3})
    attempt("n_lego|shape", owner={"n_lego": 3})
    attempt("dtype", member={"dtype": "fp16"})
    attempt("memory_dtype", member={"memory_dtype": "float16"})
    attempt("needs", member={"n_split": 1})
    attempt("does not know", block={"format_version": 1})
    lego.load(tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda t: t.update({f"{MEMBER}.lego_filters": torch.zeros(3)}))
    assert "unknown" in refused(tmp_path / "a")
