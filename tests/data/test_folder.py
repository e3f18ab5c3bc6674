"""Which files of a folder are images, and what is told of the others."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image

from legocompress.data.folder import ENDINGS, find_images, image_endings
from legocompress.errors import DataError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_every_ending_that_pillow_opens_counts(tmp_path: Path) -> None:
    names = [f"{number}{ending}" for number, ending in enumerate(image_endings())]
    touch(tmp_path, *names, "x.JFIF")
    found, _ = find_images(str(tmp_path))
    assert [Path(path).name for path, _ in found] == [*names, "x.JFIF"]
    assert {".png", ".jpg", ".jfif", ".gif", ".bmp", ".tif", ".ppm"} <= set(image_endings())


def test_an_ending_that_pillow_cannot_open_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    formats = {ending: "PNG" for ending in ENDINGS if ending != ".avif"}
    monkeypatch.setattr(Image, "registered_extensions", lambda: formats)
    touch(tmp_path, "a.png", "b.avif")
    assert [Path(path).name for path, _ in find_images(str(tmp_path))[0]] == ["a.png"]
    assert f"1 file of other types in '{tmp_path}' is left out (.avif 1)" in caplog.messages


def test_files_of_other_types_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a/1.png", "a/notes.txt", "b/2.png", "b/x.HEIC", "list.txt", "b/.DS_Store")
    with caplog.at_level(logging.WARNING, "legocompress"):
        for _ in range(2):
            find_images(str(tmp_path))
    assert caplog.messages == [
        f"3 files of other types in '{tmp_path}' are left out (.txt 2, .heic 1)"
    ]


def test_folders_that_a_class_map_does_not_name_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "cat/1.png", "dog/2.png", "dgo/3.png", "dgo/4.png", "5.png")
    found, _ = find_images(str(tmp_path), {"cat": 7, "dog": 2}, "map.txt")
    assert [label for _, label in found] == [7, 2]
    assert caplog.messages == [
        f"3 images in sub-folders of '{tmp_path}' that 'map.txt' does not name are left out "
        "(dgo 2, no sub-folder 1)"
    ]


def test_a_folder_of_other_types_only(tmp_path: Path) -> None:
    touch(tmp_path, "a.heic", "b.heic", "README")
    reason = r"holds no images; .* other types \(.heic 2, no ending 1\).* are read: .png"
    with pytest.raises(DataError, match=reason):
        find_images(str(tmp_path))
