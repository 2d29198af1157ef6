"""The data of the task's own test loader."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from debiased_laplace import _data
from debiased_laplace.cli.inputs.form import Chunk
from debiased_laplace.evaluation.provenance import data_digest, seeded
from debiased_laplace.evaluation.tasks import Context, Task


class TestLoader:
    """Batches of the test loader, with their targets."""

    def __init__(self, task: Task, context: Context, batch_size: int | None) -> None:
        self._task, self._context, self._size = task, context, batch_size
        loader = self._loader()
        self.total = _data.dataset_length(loader)

    def _loader(self) -> Any:
        return self._task.loader("test_loader", self._context)

    def digest(self) -> str:
        """Of the data that a digest of a loader looks at; every chunk has its own."""
        with seeded(self._context.seed):
            return data_digest(self._loader())

    def chunks(self) -> Iterator[Chunk]:
        """Batches as they come, cut where they are larger than was asked for."""
        start = 0
        for inputs, targets, n in _data.labelled(self._loader()):
            for part in _data.slices(n, self._size or n):
                some, of_some = _data.take(inputs, part), targets[part]
                digest = data_digest([(some, of_some)], None)
                yield Chunk(
                    start, len(of_some), partial(_data.take, inputs, part), {"targets": of_some.cpu().numpy()}, digest
                )
                start += len(of_some)
