"""The commands about one posterior in a file: `fit` and `predict`."""

from __future__ import annotations

import glob
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from debiased_laplace.cli.arguments import (
    BudgetOption,
    DataOption,
    DeviceOption,
    FixedCacheOption,
    OneSeedOption,
    PosteriorArgument,
    QuickOption,
    StructureOption,
    TaskArgument,
    budget_of,
    check_file,
    check_structure,
    load_posterior,
    load_task,
)
from debiased_laplace.cli.launched import device_of_process, is_first, together
from debiased_laplace.cli.program import INTERRUPTED
from debiased_laplace.cli.session import answer
from debiased_laplace.cli.terminal import importing, shown_warnings

if TYPE_CHECKING:
    from debiased_laplace import Laplace
    from debiased_laplace.cli.inputs import Source
    from debiased_laplace.evaluation.tasks import Context, Task


def fit(
    task: TaskArgument,
    out: Annotated[Path, typer.Option(help="File for the posterior.")] = Path("posterior.safetensors"),
    seed: OneSeedOption = 0,
    budget: BudgetOption = None,
    structure: StructureOption = "kron",
    data_dir: DataOption = None,
    cache: FixedCacheOption = Path("cache"),
    device: DeviceOption = None,
    quick: QuickOption = False,
) -> None:
    """Fit and tune a posterior for a task's network, and save it. An interrupted fit goes on where it stopped.

    Under torchrun every process reads the loaders, and computes its share.
    """
    check_file(out, task)
    start = time.perf_counter()
    with importing():
        from debiased_laplace import DebiasedLaplace, _data
        from debiased_laplace.evaluation.methods import Options, recipe
        from debiased_laplace.evaluation.provenance import seeded
    check_structure(structure)
    loaded, context = load_task(task, device, data_dir, cache, quick, seed)
    context = replace(context, device=device_of_process(context.device))
    with shown_warnings(is_first()), together("fit") as ranks:
        with seeded(seed):
            model = ranks.after_first(lambda: loaded.model(context))

        def data(name: str) -> Any:
            loader = loaded.loader(name, context)
            return loader if ranks.size == 1 else _data.Dealt(loader, ranks)

        la = DebiasedLaplace(model, loaded.likelihood, hessian_structure=structure, seed=seed)
        budget = budget_of(loaded, budget)
        try:
            checkpoint = _checkpoint_path(out, loaded, context, model, {"budget": budget, "structure": structure})
            with seeded(seed):
                la.fit(
                    data("train_loader"), budget=budget, n_data=loaded.n_data, generator=seed, progress_bar=is_first(),
                    checkpoint=checkpoint,
                )  # fmt: skip
        except KeyboardInterrupt:
            typer.echo("Interrupted. Run the same command to go on.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        with seeded(seed):  # in every process the same, also in one that has trained the network
            la.optimize_prior_precision(
                val_loader=data("val_loader"), progress_bar=is_first(), **Options().search, **recipe(loaded.likelihood)
            )
        if is_first():
            la.save(out)
            checkpoint.unlink(missing_ok=True)
    if not is_first():
        return
    native, priors = la.native, la.prior_precision.flatten().tolist()
    answer(
        file=str(out.resolve()), task=loaded.name, likelihood=loaded.likelihood, structure=structure,
        device=str(context.device), n_data=int(native.posterior.n_data), n_parameters=native.network.n_params,
        coverage=la.coverage(), prior_precision=priors,
        output_temperature=float(native.output_temperature), link=native.link,
        noise_std=_noise(native),
        mean_loss=native.fitted.mean_loss, seconds=time.perf_counter() - start,
    )  # fmt: skip
    typer.echo(la.coverage())
    typer.echo(f"Prior precision {priors[0]:.4g}. Written: {out.resolve()}")


def predict(
    task: TaskArgument,
    posterior: PosteriorArgument,
    inputs: Annotated[
        Path | None,
        typer.Option(help="A .csv, .npy or .npz file, or a folder of images; by default the task's test data."),
    ] = None,
    out: Annotated[Path, typer.Option(help="File for the predictions: .npz, or .csv.")] = Path("predictions.npz"),
    columns: Annotated[
        str | None, typer.Option(help="Of a .csv file, the names of those that are inputs: a,b,c. By default all.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Data at a time; the loader's, and 256 of files, by default.")
    ] = None,
    seed: OneSeedOption = 0,
    data_dir: DataOption = None,
    cache: FixedCacheOption = Path("cache"),
    device: DeviceOption = None,
    quick: QuickOption = False,
) -> None:
    """Predict with a saved posterior: probabilities, or means, with their uncertainties.

    Finished parts are kept beside the file: interrupted, the same command goes on.
    """
    check_file(out, task, posterior, inputs)
    start = time.perf_counter()
    if out.suffix not in (".npz", ".csv"):
        raise typer.BadParameter(f"Expected a file .npz or .csv, got {out}.", param_hint="--out")
    if not posterior.is_file():
        raise typer.BadParameter(f"{posterior} does not exist. `debiased-laplace fit` writes one.")
    if inputs is not None and not inputs.exists():
        raise typer.BadParameter(f"{inputs} does not exist.", param_hint="--inputs")
    if columns and (inputs is None or inputs.suffix != ".csv"):
        raise typer.BadParameter("Expected a .csv file as --inputs, which has columns.", param_hint="--columns")
    with importing():
        from debiased_laplace.cli.inputs import source_of
        from debiased_laplace.cli.predictions import Parts
        from debiased_laplace.evaluation.provenance import seeded
    loaded, context = load_task(task, device, data_dir, cache, quick, seed)
    with shown_warnings(), seeded(seed):
        model = loaded.model(context)
        native = load_posterior(posterior, model)
        chosen = [name.strip() for name in columns.split(",")] if columns else []
        source = source_of(loaded, context, inputs, chosen, batch_size)
        parts = Parts(out, _made_from(loaded, context, model, posterior, source, inputs is not None, batch_size))
    for other in parts.others:
        typer.echo(f"Not used: {other}, interrupted predictions of another posterior or other data.", err=True)
    try:
        with shown_warnings(), seeded(seed):
            parts.make(native, source)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. {parts.n} data are kept in {parts.folder}: run the same command to go on.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    shapes = parts.shapes()
    parts.write([str(name) for name in loaded.constant("CLASSES", None) or ()])
    answer(
        file=str(out.resolve()), task=loaded.name, likelihood=loaded.likelihood, posterior=str(posterior.resolve()),
        inputs=None if inputs is None else str(inputs.resolve()), device=str(context.device), n=parts.n,
        n_kept=parts.n_kept, arrays=shapes, seconds=time.perf_counter() - start,
    )  # fmt: skip
    described = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
    if parts.n_kept:
        typer.echo(f"{parts.n_kept} of {parts.n} had been predicted before.", err=True)
    typer.echo(f"{described}. Written: {out.resolve()}")


def _noise(posterior: Laplace) -> list[float] | None:
    """Standard deviation of the noise of every output, or one for all; None of a likelihood without."""
    import torch

    if not posterior.likelihood.has_noise:
        return None
    return torch.as_tensor(posterior.posterior.noise_variance).double().sqrt().reshape(-1).tolist()


def _made_from(
    task: Task, context: Context, model: Any, posterior: Path, source: Source, files: bool, batch_size: int | None
) -> dict[str, Any]:
    """What decides the parts of predictions."""
    import torch

    from debiased_laplace.cli.inputs.form import digest_of_files
    from debiased_laplace.evaluation.provenance import data_digest, network_digest
    from debiased_laplace.evaluation.suite.subject import base_settings

    # What transform() depends on besides the task file shows in what it returns.
    transformed = (
        data_digest([(next(source.chunks()).read(), torch.zeros(0))]) if files and task.has("transform") else ""
    )
    return base_settings(task, context) | {"transformed": transformed} | {
        "network": network_digest(model), "posterior": digest_of_files([posterior]), "inputs": source.digest(),
        "batch_size": batch_size, "seed": context.seed,
    }  # fmt: skip


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
