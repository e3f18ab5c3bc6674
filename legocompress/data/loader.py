"""A data loader whose workers end with their parent process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from threading import Thread
from typing import Any

from torch.utils.data import DataLoader

from legocompress.data.reading import read_in_threads
from legocompress.errors import DataError


class Loader(DataLoader[Any]):
    """A loader whose workers end with its process, and whose errors are one sentence.

    Without workers, image files and arrays are read in threads (`read_in_threads`).
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches: Any = self.batch_sampler
        read = None
        if not self.num_workers and batches is not None:
            read = read_in_threads(self.dataset, batches)
        if read is not None:
            yield from read
            return
        self.worker_init_fn = partial(_end_with, os.getpid())
        try:
            yield from super().__iter__()
        except DataError as error:
            last = str(error).strip().splitlines()[-1]
            raise DataError(last.rpartition("DataError: ")[2]) from None


def _end_with(parent: int, worker: int) -> None:
    """Watch the parent process, and end this worker process when the parent is gone.

    PyTorch's own check reads the parent's process id after the worker has started. A worker whose
    parent was killed before that would wait forever, with its memory and its open files.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
