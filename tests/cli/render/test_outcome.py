"""The last line of a conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
from legocompress_cli.render import describe_outcome, print_outcome

from legocompress.state.calibration import Calibration
from legocompress.state.source import Source

TRAINED = Source("timm", "resnet50", weights="resnet50")


def record(agreement: float | None = 97.25, synthetic: bool = False) -> Calibration:
    return Calibration(
        images=100, sha256="", synthetic=synthetic, seed=0, epochs=1, norms=True,
        error_before=0.9, error_after=0.125, agreement_before=3.0, agreement_after=agreement,
        layers=[],
    )  # fmt: skip


def test_without_photos_it_gives_the_command_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = describe_outcome(Path("my nets/r50-lego"), None, TRAINED)
    assert not outcome.calibrated
    assert outcome.command == "legocompress calibrate 'my nets/r50-lego' --data PHOTOS"
    print_outcome(outcome)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"Accuracy is lost until this has run: {outcome.command}"


def test_the_weights_file_is_part_of_the_command() -> None:
    outcome = describe_outcome(Path("net"), None, TRAINED, Path("a.pth"))
    assert outcome.command == "legocompress calibrate net --data PHOTOS --original-weights a.pth"


def test_random_weights_have_nothing_to_lose() -> None:
    random = Source("timm", "resnet50", weights="random, seed 0")
    outcome = describe_outcome(Path("net"), None, random)
    assert "no accuracy to lose" in outcome.message
    assert outcome.command == "legocompress report net"


@pytest.mark.parametrize(
    ("calibration", "kept"),
    [
        (record(), "Kept: the original's class on 97.2 % of the held-out photos"),
        (record(synthetic=True), "Kept: the original's class on 97.2 % of the held-out synthetic"),
        (record(None), "Kept: an output error of 0.125 on held-out photos"),
    ],
)
def test_with_photos_it_says_what_is_kept(
    calibration: Calibration, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = describe_outcome(Path("net"), calibration, TRAINED)
    print_outcome(outcome)
    assert capsys.readouterr().out.splitlines()[-1].startswith(kept)
    assert outcome.to_dict()["agreement"] == calibration.agreement_after
