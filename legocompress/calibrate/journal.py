"""Store the layers that a calibration has repaired, so that an interrupted one can continue."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from legocompress.files import write_atomically
from legocompress.lego.module import LegoModule
from legocompress.state.calibration import LayerRepair

RowT = TypeVar("RowT", bound=BaseModel)


def hash_tensors(*tensors: Tensor) -> str:
    """SHA-256 over the values of tensors, in hex."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


class Journal:
    """A folder of repaired layers, one file each; files of other calibrations are ignored.

    Args:
        folder: created if it does not exist.
        key: identifies the calibration by its networks, images and settings.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, row: LayerRepair, layer: LegoModule) -> None:
        """Write one repaired layer."""
        tensors = {name: value.contiguous() for name, value in layer.state_dict().items()}
        with write_atomically(self._path(row.name), force=True) as path:
            path.write_bytes(save(tensors, {"key": self.key, "row": row.model_dump_json()}))

    def take_(self, name: str, layer: LegoModule) -> LayerRepair | None:
        """Restore a layer, if this same calibration has written it; return its row, else None."""
        try:
            with safe_open(self._path(name), "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key:
                    return None
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            layer.load_state_dict(tensors)
            return LayerRepair.model_validate_json(metadata["row"])
        except (OSError, SafetensorError, RuntimeError, ValueError, KeyError):
            return None

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"


class RowJournal:
    """A folder of measured rows, one JSON file each; files of other measurements are ignored.

    Args:
        folder: created if it does not exist.
        key: identifies the measurement by its network, images and settings.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, row: BaseModel) -> None:
        """Write the row of one layer."""
        with write_atomically(self._path(name), force=True) as path:
            path.write_text(json.dumps({"key": self.key, "row": row.model_dump(mode="json")}))

    def take(self, name: str, kind: type[RowT]) -> RowT | None:
        """Read the row of a layer, if this same measurement has written it."""
        try:
            values = json.loads(self._path(name).read_text())
            if values["key"] != self.key:
                return None
            return kind.model_validate_json(json.dumps(values["row"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def hash_states(*networks: nn.Module) -> str:
    """SHA-256 over the state of networks."""
    return hash_tensors(*(value for network in networks for value in network.state_dict().values()))
