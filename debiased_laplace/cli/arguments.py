"""Arguments and options that several commands have, and what is refused before anything takes time."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from debiased_laplace.cli import completion

if TYPE_CHECKING:
    import torch
    from torch import nn

    from debiased_laplace import Laplace
    from debiased_laplace.evaluation.tasks import Context, Task

TaskArgument = Annotated[
    str,
    typer.Argument(
        help="A task file, or a shipped task (see `tasks`).", metavar="TASK", autocompletion=completion.tasks
    ),
]
PosteriorArgument = Annotated[
    Path,
    typer.Argument(help="File that `fit` wrote.", metavar="POSTERIOR", autocompletion=completion.posteriors),
]
StructureOption = Annotated[
    str, typer.Option(help="kron, lowrank, diag, full or isotropic.", autocompletion=completion.structures)
]
BudgetOption = Annotated[int | None, typer.Option(min=0, help="Training data for curvature; 0 for all of them.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default cuda if there is one.")]
DataOption = Annotated[Path | None, typer.Option(help="Folder with local data, for tasks that look for some.")]
CacheOption = Annotated[
    Path | None, typer.Option(help="Folder where the task keeps trained weights; OUT/cache by default.")
]
FixedCacheOption = Annotated[Path, typer.Option(help="Folder where the task keeps trained weights.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="Little of everything, as a try.")]
ProcessesOption = Annotated[
    int,
    typer.Option(min=1, help="Seeds at a time; with more than one each is a process with one thread."),
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="First seed; the others follow it.")]
OneSeedOption = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of everything random.")]


def load_task(
    source: str, device: str | None, data_dir: Path | None, cache: Path, quick: bool, seed: int = 0
) -> tuple[Task, Context]:
    """Load the task, and say where and for which seed it runs."""
    from debiased_laplace.evaluation.tasks import Context, Task

    if data_dir is not None and not data_dir.is_dir():
        raise typer.BadParameter(f"{data_dir} is no folder.", param_hint="--data-dir")
    where = choose_device(device)
    return Task.load(source), Context(seed, data_dir, cache, quick, where)


def load_posterior(path: Path, model: nn.Module) -> Laplace:
    """The posterior in a file, whichever class wrote it."""
    from debiased_laplace import DebiasedLaplace, _store, laplace

    if _store.read_header(path).get("kind") == laplace.POSTERIOR_FILE:
        return laplace.load(path, model)
    native = DebiasedLaplace.load(path, model).native
    return replace(native, link=native.link or native.likelihood.links[0])  # as that class predicts


def choose_device(name: str | None) -> torch.device:
    """The device by that name, or the default."""
    from debiased_laplace.evaluation.tasks import resolve_device

    try:
        return resolve_device(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None


def check_file(path: Path, *read: str | Path | None) -> None:
    """Refuse a file that cannot be written, or is one of those that are read, before anything takes time."""
    for other in read:
        if other is not None and Path(other).exists() and Path(other).resolve() == path.resolve():
            raise typer.BadParameter(f"{path} is read by this command. Name another file.", param_hint="--out")
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder. Name a file.", param_hint="--out")
    check_folder(path.parent)
    from debiased_laplace import _files

    try:
        _files.check_writable(path)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from None


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be written to, before anything takes time."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except FileExistsError:
        raise typer.BadParameter(f"{out} is a file. Name a folder.", param_hint="--out") from None
    except OSError as error:
        message = f"Cannot write to {out}: {error.strerror}. Name another folder."
        raise typer.BadParameter(message, param_hint="--out") from None


def check_structure(name: str) -> None:
    """Refuse a structure that there is not."""
    from debiased_laplace.curvature.structures import STRUCTURES

    if name not in STRUCTURES:
        raise typer.BadParameter(f"Expected one out of {list(STRUCTURES)}, got {name!r}.", param_hint="--structure")


def budget_of(task: Task, budget: int | None) -> int | None:
    """Training data for curvature: what was asked for, or what the task says; None for all."""
    return task.budget if budget is None else budget or None
