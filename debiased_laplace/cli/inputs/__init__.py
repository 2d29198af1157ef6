"""What `predict` predicts: the task's test data, or a table, arrays or images from files, a few at a time.

A source gives chunks whose data are read when they are asked for, so that what was predicted before is passed over, and
what is in memory does not grow with the file. Only data of the test loader have targets; they also say what one datum
looks like, which the data of files are held to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from debiased_laplace import _data
from debiased_laplace.cli.inputs.arrays import Arrays
from debiased_laplace.cli.inputs.form import Chunk, Form, Source
from debiased_laplace.cli.inputs.of_task import TestLoader
from debiased_laplace.cli.inputs.pictures import Pictures
from debiased_laplace.cli.inputs.table import CsvFile
from debiased_laplace.evaluation.provenance import seeded
from debiased_laplace.evaluation.tasks import Context, Task, TaskError

__all__ = ["Chunk", "Source", "source_of"]

#: Data at a time, of files.
CHUNK = 256
#: Data of the test loader that say what a datum looks like.
EXAMPLES = 32


def source_of(
    task: Task, context: Context, path: Path | None, columns: Sequence[str], batch_size: int | None
) -> Source:  # fmt: skip
    """Where the data come from.

    Args:
        task: Has the test loader, and may have ``transform()``.
        context: What it may ask for.
        path: A table, arrays or a folder of images; None for the test loader.
        columns: Of a table, those that are inputs; none for all.
        batch_size: Data at a time; None for the loader's own, or :data:`CHUNK`.

    Raises:
        ValueError: If the file is of another kind, or its data do not fit.
    """
    if path is None:
        return TestLoader(task, context, batch_size)
    with seeded(context.seed):
        first = next(_data.labelled(task.loader("test_loader", context)), None)
    if first is None:
        raise TaskError(f"Expected data from test_loader() of {task.source}, got none. A generator is read only once.")
    form, size = Form(task, _data.some(first[0], EXAMPLES)), batch_size or CHUNK
    if path.is_dir():
        return Pictures(path, form, size)
    if path.suffix == ".csv":
        return CsvFile(path, form, size, columns)
    if path.suffix in (".npy", ".npz"):
        return Arrays(path, form, size)
    raise ValueError(f"Expected a folder of images, or a file .csv, .npy or .npz, got {path}. Convert it.")
