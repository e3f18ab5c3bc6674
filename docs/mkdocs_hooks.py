"""Hooks of mkdocs: pages that are generated, and links that lead out of docs/.

README.md and its like stand where GitHub looks for them. On the site they are pages, too. A link to
another file of the repository becomes plain text, or an address where mkdocs.yml has a repo_url.
The reference page lists what legocompress/__init__.py exports, grouped by the room that it is from.
A notebook becomes a page with the outputs that it holds.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT_PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
NOTEBOOKS = {"docs/tutorial.ipynb": "tutorial.md"}
REFERENCE = "<!-- the names of the facade -->"
# The headings of the reference, in the order of the work. Other rooms follow under their names.
HEADINGS = {
    "models": "Networks",
    "spec": "Settings",
    "compress": "Plan and convert",
    "calibrate": "Calibrate",
    "quantize": "Quantise",
    "finetune": "Fine-tune",
    "data": "Images and accuracy",
    "checkpoint": "Save and load",
    "deploy": "Deploy",
    "report": "Measure and report",
    "export": "Export",
    "lego": "Lego modules",
    "state": "What a network carries with it",
    "errors": "Errors",
}
LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages, and the notebooks."""
    root = Path(config.config_file_path).parent
    for source, page in NOTEBOOKS.items():
        files.append(File.generated(config, page, content=render_notebook(root / source)))
    for source, page in ROOT_PAGES.items():
        if (root / source).exists():
            content = (root / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in the reference, and point the page's links to where their files are on the site."""
    if REFERENCE in markdown:
        root = Path(config.config_file_path).parent
        markdown = markdown.replace(REFERENCE, reference(root / "legocompress" / "__init__.py"))
    here = page.file.src_uri
    sources = {name: source for source, name in ROOT_PAGES.items()}
    folder = posixpath.dirname(sources.get(here, f"docs/{here}"))

    def replace(link: re.Match[str]) -> str:
        image, text, target, anchor = link[1], link[2], link[3], link[4] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        uri = {**ROOT_PAGES, **NOTEBOOKS}.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(uri) is not None:
            relative = posixpath.relpath(uri, posixpath.dirname(here) or ".")
            return f"{image}[{text}]({relative}{anchor})"
        if path.startswith("docs/") or image:
            return link[0]  # a page that is missing: mkdocs warns
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path}{anchor})"
        return text

    return LINK.sub(replace, markdown)


def reference(facade: Path) -> str:
    """Write one directive of mkdocstrings for each imported name of `__all__`, room after room.

    A directive for the facade alone would miss a function whose module has the same name.
    """
    tree = ast.parse(facade.read_text(encoding="utf-8"))
    modules = {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    rooms: dict[str, list[str]] = {room: [] for room in HEADINGS}
    for name in names:
        if name in modules:
            room = modules[name].split(".")[1]
            rooms.setdefault(room, []).append(f"::: {modules[name]}.{name}")
    parts = []
    for room, directives in rooms.items():
        if directives:
            parts += [f"## {HEADINGS.get(room, room.capitalize())}", *directives]
    return "\n\n".join(parts)


def render_notebook(path: Path) -> str:
    """Write a notebook as a page: its text, its code, and what the code has printed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join(line for output in cell["outputs"] for line in output["text"])
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
