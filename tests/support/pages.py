"""What the tests of HTML pages share: networks for them, and a parser that lists their tags."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import torch
from torch import Tensor, nn

import legocompress as lego

VOID = ("meta", "img", "rect", "path", "polyline")
IMAGE = torch.zeros(1, 3, 8, 8)


class NamedNetwork(nn.Module):
    """Three convs and a Linear, whose names a test chooses."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.add_module(f"{prefix}0", nn.Conv2d(3, 8, 3, padding=1))
        self.add_module(f"{prefix}1", nn.Conv2d(8, 16, 3, padding=1))
        self.add_module(f"{prefix}2", nn.Conv2d(16, 16, 1))
        self.add_module(f"{prefix}3", nn.Linear(16, 6))

    def forward(self, x: Tensor) -> Tensor:
        for number in range(3):
            x = self.get_submodule(f"{self.prefix}{number}")(x).relu()
        return self.get_submodule(f"{self.prefix}3")(x.mean((2, 3)))


def make_pair(prefix: str = "layer") -> tuple[nn.Module, nn.Module, lego.Report]:
    """A dense network, its compressed copy, and the measurement of that."""
    torch.manual_seed(0)
    original = NamedNetwork(prefix)
    model = NamedNetwork(prefix)
    model.load_state_dict(original.state_dict())
    spec = lego.LegoSpec(m=0.5, o=2, k=1, allow_expansion=True)
    lego.convert_(model, lego.plan(model, spec, IMAGE))
    return original.eval(), model.eval(), lego.measure(model, example_input=IMAGE)


class PageParser(HTMLParser):
    """Lists the tags with the names of their attributes, the addresses, and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.open_tags: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        for name, value in attrs:
            if name in ("href", "src", "action", "formaction", "data", "xlink:href", "srcset"):
                self.addresses.append(value or "")
            elif name in ("alt", "title", "aria-label"):
                self.texts.append(value or "")
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        """All text, also that of attributes, with single spaces."""
        return " ".join(" ".join(self.texts).split())


def read_page(path: Path) -> PageParser:
    return PageParser(path.read_text(encoding="utf-8"))
