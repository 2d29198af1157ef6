"""The commands about one posterior in a file: `fit` and `predict`."""

from __future__ import annotations

import glob
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from debiased_laplace.cli.arguments import (
    DataOption,
    DeviceOption,
    FixedCacheOption,
    QuickOption,
    SeedOption,
    TaskArgument,
    check_file,
    load_task,
)
from debiased_laplace.cli.launched import device_of_process, is_first, together
from debiased_laplace.cli.terminal import clear_errors, importing, shown_warnings

if TYPE_CHECKING:
    from debiased_laplace.evaluation.tasks import Context, Task


def fit(
    task: TaskArgument,
    out: Annotated[Path, typer.Option(help="File for the posterior.")] = Path("posterior.safetensors"),
    seed: SeedOption = 0,
    budget: Annotated[int | None, typer.Option(min=0, help="Training data for curvature; 0 for all of them.")] = None,
    structure: Annotated[str, typer.Option(help="kron, lowrank, diag, full or isotropic.")] = "kron",
    data_dir: DataOption = None,
    cache: FixedCacheOption = Path("cache"),
    device: DeviceOption = None,
    quick: QuickOption = False,
) -> None:
    """Fit and tune a posterior for a task's network, and save it. An interrupted fit goes on where it stopped.

    Under torchrun every process reads the task's loaders, and computes its share of the data.
    """
    check_file(out)
    with importing():
        from debiased_laplace import DebiasedLaplace, _data
        from debiased_laplace.curvature.structures import STRUCTURES
        from debiased_laplace.evaluation.methods import Options, recipe
        from debiased_laplace.evaluation.provenance import seeded
    if structure not in STRUCTURES:
        raise typer.BadParameter(
            f"Expected one out of {list(STRUCTURES)}, got {structure!r}.", param_hint="--structure"
        )
    loaded, context = load_task(task, device, data_dir, cache, quick, seed)
    context = replace(context, device=device_of_process(context.device))
    with clear_errors(), shown_warnings(is_first()), together("fit") as ranks:
        with seeded(seed):
            model = ranks.after_first(lambda: loaded.model(context))

        def data(name: str) -> Any:
            loader = loaded.loader(name, context)
            return loader if ranks.size == 1 else _data.Dealt(loader, ranks)

        la = DebiasedLaplace(model, loaded.likelihood, hessian_structure=structure, seed=seed)
        budget = loaded.budget if budget is None else budget or None
        try:
            checkpoint = _checkpoint_path(out, loaded, context, model, {"budget": budget, "structure": structure})
            with seeded(seed):
                la.fit(
                    data("train_loader"), budget=budget, n_data=loaded.n_data, generator=seed, progress_bar=is_first(),
                    checkpoint=checkpoint,
                )  # fmt: skip
        except KeyboardInterrupt:
            typer.echo("Interrupted. Run the same command to go on.", err=True)
            raise typer.Exit(130) from None
        with seeded(seed):  # in every process the same, also in one that has trained the network
            la.optimize_prior_precision(
                val_loader=data("val_loader"), progress_bar=is_first(), **Options().search, **recipe(loaded.likelihood)
            )
        if is_first():
            la.save(out)
            checkpoint.unlink(missing_ok=True)
    if not is_first():
        return
    typer.echo(la.coverage())
    typer.echo(f"Prior precision {float(la.prior_precision.flatten()[0]):.4g}. Written: {out.resolve()}")


def predict(
    task: TaskArgument,
    posterior: Annotated[Path, typer.Argument(help="File that `fit` wrote.")],
    out: Annotated[Path, typer.Option(help="File for the predictions (NumPy's .npz).")] = Path("predictions.npz"),
    seed: SeedOption = 0,
    data_dir: DataOption = None,
    cache: FixedCacheOption = Path("cache"),
    device: DeviceOption = None,
    quick: QuickOption = False,
) -> None:
    """Predict a task's test data with a saved posterior: probabilities, or mean and variance, and the targets."""
    check_file(out)
    with importing():
        import numpy as np
        from tqdm import tqdm

        from debiased_laplace import DebiasedLaplace, _data
        from debiased_laplace.evaluation import LaplacePredictor
        from debiased_laplace.evaluation.provenance import seeded
        from debiased_laplace.evaluation.records import write_whole
    if not posterior.is_file():
        raise typer.BadParameter(f"{posterior} does not exist. `debiased-laplace fit` writes one.")
    loaded, context = load_task(task, device, data_dir, cache, quick, seed)
    with clear_errors(), seeded(seed):
        la = DebiasedLaplace.load(posterior, loaded.model(context))
        predictor, parts = LaplacePredictor(la), []
        for inputs, targets, _ in tqdm(_data.labelled(loaded.loader("test_loader", context)), unit="batch"):
            parts.append(predictor(inputs).arrays() | {"targets": targets.cpu().numpy()})
        arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    write_whole(out, file.getvalue())
    shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in arrays.items())
    typer.echo(f"{shapes}. Written: {out.resolve()}")


def _checkpoint_path(out: Path, task: Task, context: Context, model: Any, settings: Mapping[str, Any]) -> Path:
    """Where the progress of a fit is kept: beside the posterior, under a digest of what it is made from."""
    from debiased_laplace.evaluation import records
    from debiased_laplace.evaluation.provenance import data_digest, network_digest, seeded
    from debiased_laplace.evaluation.suite.subject import base_settings

    with seeded(context.seed):
        data = data_digest(task.loader("train_loader", context))
    made_from = base_settings(task, context) | {"network": network_digest(model), "data": data, "seed": context.seed}
    path = out.with_name(f"{out.name}.{records.digest({**made_from, **settings})}.progress")
    for other in set(out.parent.glob(f"{glob.escape(out.name)}.????????.progress")) - {path}:
        typer.echo(f"Not used: {other}, an interrupted fit of another network, other data or settings.", err=True)
    return path
