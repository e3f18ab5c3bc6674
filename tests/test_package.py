"""What is installed, and what every file of the package keeps to."""

from __future__ import annotations

import ast
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "legocompress"
SOURCES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = sorted((ROOT / "cli").rglob("*.py"))


def layer(path: Path) -> str:
    """The dotted name of a file inside the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_errors_imports_nothing() -> None:
    nodes = list(ast.walk(tree(ROOT / "legocompress" / "errors.py")))
    assert not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes)


def test_the_spec_needs_no_torch() -> None:
    names = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree(ROOT / "legocompress" / "spec.py"))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert not any(str(name).split(".")[0] in ("torch", "timm") for name in names)


@pytest.mark.parametrize("path", SOURCES, ids=layer)
def test_no_import_hides_in_a_function(path: Path) -> None:
    for function in ast.walk(tree(path)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                assert not isinstance(node, (ast.Import, ast.ImportFrom)), function.name


@pytest.mark.parametrize("path", [*SOURCES, *COMMANDS], ids=lambda path: path.name)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(tree(path))
    assert docstring
    assert docstring.splitlines()[0].endswith((".", ";"))


def test_the_facade_names_what_it_gives() -> None:
    import legocompress

    assert sorted(legocompress.__all__) == legocompress.__all__
    assert all(getattr(legocompress, name) is not None for name in legocompress.__all__)
    assert legocompress.__version__ == importlib.metadata.version("legocompress")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built of a copy, so that nothing is left in the checkout and nothing old gets in."""
    pytest.importorskip("build")
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    litter = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist", ".*", "tmp*")
    shutil.copytree(ROOT, source, ignore=litter)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place)]
    ran = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    (path,) = place.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_the_installed_top_level_names_are_two(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "legocompress",
        "legocompress_cli",
    }
    assert sum(top.endswith(".dist-info") for top in tops) == 1


@pytest.mark.slow
def test_the_wheel_fits_every_python_of_its_platform(wheel: zipfile.ZipFile) -> None:
    (about,) = (name for name in wheel.namelist() if name.endswith(".dist-info/WHEEL"))
    tags = [line for line in wheel.read(about).decode().splitlines() if line.startswith("Tag: ")]
    assert len(tags) == 1
    assert tags[0].startswith("Tag: py3-none-")
    assert not tags[0].endswith("-any")


@pytest.mark.slow
def test_the_wheel_holds_every_source_and_the_demo(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    expected |= {f"legocompress_cli/{p.relative_to(ROOT / 'cli').as_posix()}" for p in COMMANDS}
    expected |= {f"legocompress/recipes/{p.name}" for p in (ROOT / "recipes").glob("*.yaml")}
    expected |= {
        "legocompress/py.typed",
        "legocompress/demo/NOTICE",
        "legocompress/demo/fashion-sample.npz",
        "legocompress/demo/fashion-calibration.npz",
        "legocompress/demo/fashion-resnet/config.json",
        "legocompress/demo/fashion-resnet/model.safetensors",
    }
    assert expected <= names
    sample = (ROOT / "legocompress" / "demo" / "fashion-sample.npz").read_bytes()
    assert wheel.read("legocompress/demo/fashion-sample.npz") == sample


@pytest.mark.slow
def test_the_wheel_holds_its_licence_and_its_command(wheel: zipfile.ZipFile) -> None:
    def only(ending: str) -> str:
        (name,) = (n for n in wheel.namelist() if n.endswith(ending))
        return wheel.read(name).decode()

    assert only(".dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    assert "legocompress = legocompress_cli.main:main" in only("entry_points.txt")
    metadata = only(".dist-info/METADATA")
    assert "\nName: legocompress\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
