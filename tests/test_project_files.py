"""The files around the code: they parse, and every file and target that they name exists."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
YAMLS = [
    *WORKFLOWS,
    *FORMS,
    ROOT / "CITATION.cff",
    ROOT / ".pre-commit-config.yaml",
    ROOT / "mkdocs.yml",
]
TEXTS = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / ".github" / "pull_request_template.md",
]
# What begins a path in this repository.
PATH = re.compile(r"`((?:legocompress|cli|recipes|tests|docs|benchmarks|\.github|\.ci)/[\w./-]*)`")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def project() -> dict[str, Any]:
    # pytest depends on tomli where Python has no tomllib.
    reader = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    values: dict[str, Any] = reader.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return values


def targets() -> set[str]:
    """The targets that the Makefile can make."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([\w./-]+):(?!=)", makefile, re.MULTILINE)) - {".PHONY"}


def commands(workflow: Path) -> list[str]:
    jobs = read_yaml(workflow)["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", YAMLS, ids=name)
def test_yaml_parses_to_a_mapping(path: Path) -> None:
    assert isinstance(read_yaml(path), dict)


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_links_and_paths_in_texts_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []
    assert [file for file in PATH.findall(text) if not (ROOT / file).exists()] == []


def test_every_make_target_that_is_named_exists() -> None:
    pages = [*TEXTS, ROOT / "README.md", ROOT / ".ci" / "run"]
    texts = [path.read_text(encoding="utf-8") for path in pages]
    texts += ["\n".join(commands(path)) for path in WORKFLOWS]
    # In code: at the start of a line or after a backtick.
    found = {t for text in texts for t in re.findall(r"(?:^\s*|`)make ([\w./-]+)", text, re.M)}
    assert {"test", "test-fast", "format", "docs", "coverage", "demo"} <= found
    assert found <= targets()


def test_phony_targets_have_rules_and_help() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)", makefile, re.MULTILINE)
    assert set(phony.split()) <= targets()
    helped = set(re.findall(r"@echo \"make (\S+)", makefile))
    assert helped == set(phony.split()) - {"help"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=name)
def test_workflows_ask_for_little_and_pin_their_actions(path: Path) -> None:
    workflow = read_yaml(path)
    assert workflow["permissions"] == {"contents": "read"}
    for key, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 90, key
        granted = {"id-token": "write"} if key == "publish" else None
        assert job.get("permissions") == granted, key
        for step in job["steps"]:
            action, _, version = step.get("uses", "a@v1").partition("@")
            assert re.fullmatch(r"v\d+|release/v\d+", version), action
            if action == "actions/checkout":
                assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", sorted(ROOT.glob("Dockerfile*")), ids=name)
def test_images_run_the_command_without_rights(path: Path) -> None:
    lines = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8")).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    build, *_, user, _, entry = steps
    base = next(words for key, words in steps[1:] if key == "FROM")
    assert build == ["FROM", f"{base} AS build"]
    (version,) = re.findall(r"^python:([\d.]+)-slim$", base)
    assert f">={version}" >= project()["project"]["requires-python"]
    created = re.search(r"useradd --create-home (\w+)", path.read_text(encoding="utf-8"))
    assert created is not None
    assert user == ["USER", created[1]]
    (command,) = project()["project"]["scripts"]
    assert entry == ["ENTRYPOINT", f'["{command}"]']
    extras = re.findall(r"\$1\[(\w+)\]", path.read_text(encoding="utf-8"))
    assert extras
    assert set(extras) <= project()["project"]["optional-dependencies"].keys()


def test_extras_that_errors_and_docs_name_exist() -> None:
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "legocompress").rglob("*.py")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(",".join(re.findall(r"'(?:legocompress|\.)\[([\w,]+)\]'", text)).split(","))
    assert named >= {"onnx", "lightning"}
    assert named <= project()["project"]["optional-dependencies"].keys()


def test_ci_tests_every_python_and_the_oldest_torch() -> None:
    workflow = read_yaml(ROOT / ".github" / "workflows" / "ci.yml")
    matrix = workflow["jobs"]["linux"]["strategy"]["matrix"]
    about = project()["project"]
    assert f">={matrix['python'][0]}" == about["requires-python"]
    text = "\n".join(commands(ROOT / ".github" / "workflows" / "ci.yml"))
    for package in ("torch", "torchvision"):
        (oldest,) = re.findall(rf'"{package}==([\d.]+)\.\*"', text)
        assert f"{package}>={oldest}" in about["dependencies"]
    assert matrix["torch"] == ["2.6", "latest"]
    for job in ("linux", "macos", "no-compiler"):
        steps = workflow["jobs"][job]["steps"]
        assert any(step.get("run", "").startswith("make test ") for step in steps), job


@pytest.mark.parametrize("path", [p for p in FORMS if p.name != "config.yml"], ids=name)
def test_issue_forms_have_what_a_form_needs(path: Path) -> None:
    form = read_yaml(path)
    assert form["name"]
    assert form["description"]
    kinds = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in form["body"]} <= kinds
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)


def test_the_citation_agrees_with_the_package() -> None:
    citation = read_yaml(ROOT / "CITATION.cff")
    about = project()["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == about["name"]
    assert citation["version"] == about["version"]
    assert citation["license"] == about["license"]
    (paper,) = citation["references"]
    assert len(paper["authors"]) == 8
    assert (paper["start"], paper["end"], paper["volume"]) == (7005, 7014, 97)


def test_pre_commit_runs_the_tools_of_the_environment() -> None:
    repos = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    (local,) = (repo for repo in repos if repo["repo"] == "local")
    assert {hook["id"] for hook in local["hooks"]} == {"ruff", "ruff-format", "mypy"}
    tests = " ".join(project()["project"]["optional-dependencies"]["test"])
    for hook in local["hooks"]:
        assert hook["language"] == "system"
        tool = hook["entry"].split()[0]
        assert tool.startswith(".venv/bin/")
        assert tool.rpartition("/")[2] in tests
    assert all(re.fullmatch(r"v[\d.]+", repo["rev"]) for repo in repos if repo is not local)


def nav_pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in nav_pages(part)]


def test_every_page_of_docs_is_in_the_nav_and_the_other_way_round() -> None:
    hooks = (ROOT / "docs" / "mkdocs_hooks.py").read_text(encoding="utf-8")
    generated = dict(re.findall(r'"(\w+\.md)": "(\w+\.md)"', hooks))
    assert generated["README.md"] == "index.md"
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    pages |= {page for source, page in generated.items() if (ROOT / source).exists()}
    notebooks = dict(re.findall(r'"docs/([\w/]+\.ipynb)": "([\w/]+\.md)"', hooks))
    docs = ROOT / "docs"
    assert set(notebooks) == {p.relative_to(docs).as_posix() for p in docs.rglob("*.ipynb")}
    pages |= set(notebooks.values())
    nav = nav_pages(read_yaml(ROOT / "mkdocs.yml")["nav"])
    assert sorted(nav) == sorted(pages)


def test_the_manifest_names_what_exists() -> None:
    for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines():
        command, *words = line.split("#")[0].split() or [""]
        if command == "include":
            assert all(list(ROOT.glob(word)) for word in words), line
        elif command == "recursive-include":
            files = (ROOT / words[0]).rglob("*")
            assert any(file.match(word) for file in files for word in words[1:]), line
