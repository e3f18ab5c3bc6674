"""Hooks of mkdocs: pages that are generated, and links that lead out of docs/.

README.md and its like stand where GitHub looks for them. On the site they are pages, too. A link to
another file of the repository becomes plain text, or an address where mkdocs.yml has a repo_url.
The reference page lists what legocompress/__init__.py exports.
"""

from __future__ import annotations

import ast
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
REFERENCE = "<!-- the names of the facade -->"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages."""
    root = Path(config.config_file_path).parent
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
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        uri = ROOT_PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(uri) is not None:
            relative = posixpath.relpath(uri, posixpath.dirname(here) or ".")
            return f"[{text}]({relative}{anchor})"
        if path.startswith("docs/"):
            return link[0]  # a page that is missing: mkdocs warns
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path}{anchor})"
        return text

    return LINK.sub(replace, markdown)


def reference(facade: Path) -> str:
    """Write one directive of mkdocstrings for each imported name of `__all__`, in its order.

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
    return "\n\n".join(f"::: {modules[name]}.{name}" for name in names if name in modules)
