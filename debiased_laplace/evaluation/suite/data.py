"""Loaders of a task as an evaluation reads them, and two data of each through the network before the long part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from debiased_laplace import _data
from debiased_laplace._ranks import ALONE, Ranks
from debiased_laplace.evaluation.judge.conditions import conditions
from debiased_laplace.evaluation.judge.preflight import preflight
from debiased_laplace.evaluation.methods import MAP, Options
from debiased_laplace.evaluation.predictors.baselines import gaussian_predictor, point_predictor
from debiased_laplace.evaluation.predictors.one_logit import TwoClasses, two_classes
from debiased_laplace.evaluation.predictors.prediction import as_prediction
from debiased_laplace.evaluation.provenance import data_digest
from debiased_laplace.evaluation.tasks import Context, Task, TaskError
from debiased_laplace.likelihoods import Categorical, Gaussian

#: Functions that data of a kind are from.
FUNCTIONS = {"test": "test_loader", "shift": "shifted_loaders", "ood": "ood_loaders"}


def loader_of(task: Task, name: str, context: Context, n_outputs: int | None = None) -> Iterable[Any]:
    """Batches of a function of the task, made anew; targets of one logit are class indices, as everywhere here.

    Args:
        task: The task.
        name: Of the function.
        context: For the function.
        n_outputs: If it is known, targets of every batch are checked.
    """

    def read(batch: Any) -> Any:
        batch = two_classes(batch) if task.likelihood == "bernoulli" else batch
        inputs, targets, n = _data.only(batch)
        if n_outputs is not None:
            (Gaussian() if task.likelihood == "regression" else Categorical()).check_targets(targets, n_outputs)
        one_class = task.likelihood != "regression" and targets.numel() == n
        return inputs, targets.reshape(n) if one_class else targets

    return task.loader(name, context, read)


def loaders_of(task: Task, context: Context, options: Options, ranks: Ranks = ALONE) -> tuple[Any, Any, Any]:
    """Test, shifted and out-of-distribution data, made anew, or the shares of one of several processes.

    Of the latter two those that the options ask for.
    """
    read = two_classes if task.likelihood == "bernoulli" else lambda batch: batch

    def in_turns(loader: Iterable[Any]) -> Iterable[Any]:
        return loader if ranks.size == 1 else _data.InTurns(loader, ranks)

    def chosen(loaders: Mapping[Any, Any], title: str = "{}") -> dict[Any, Any]:
        kept: dict[Any, Any] = {}
        for key, loader in loaders.items():
            if isinstance(loader, Mapping):
                by_severity = chosen(loader, f"{key} {{}}")
                if by_severity:
                    kept[key] = by_severity
            elif options.conditions is None or title.format(key) in options.conditions:
                some = loader if options.n_shifted is None else _First(loader, options.n_shifted)
                kept[key] = in_turns(some)
        return kept

    return (
        in_turns(loader_of(task, "test_loader", context)),
        chosen(task.loaders("shifted_loaders", context, read) or {}),
        chosen(task.loaders("ood_loaders", context) or {}),
    )


class _First:
    """The first n data of a loader, again and again."""

    def __init__(self, loader: Iterable[Any], n: int) -> None:
        self.loader, self.n = loader, n

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return _data.head(self.loader, self.n)


def check_task(task: Task, model: nn.Module, context: Context, options: Options) -> tuple[int, dict[str, str]]:
    """Two data of every loader through the network, before anything takes time.

    Returns:
        The number of classes (outputs of a regression), and digests of the first batches of shifted and
        out-of-distribution data.

    Raises:
        TaskError: It says which function of the task, and why.
    """
    regression = task.likelihood == "regression"
    point = gaussian_predictor(model, 1.0) if regression else point_predictor(classifier(task, model))
    for name in ("train_loader", "val_loader"):
        loader = loader_of(task, name, context)
        with errors_from(task, name):
            (read,) = preflight({MAP: point}, conditions(loader))
            inputs, targets, _ = next(iter(_data.labelled(read.loader)))
            few = _data.take(inputs, slice(0, 2))
            predicted = as_prediction(point(few), _data.count(few), MAP).arrays()
            n_outputs = predicted["mean" if regression else "probabilities"].shape[1]
            (Gaussian() if regression else Categorical()).check_targets(targets, n_outputs)
    classes = list(task.constant("CLASSES", ()))
    if classes and len(classes) != n_outputs and not regression:
        raise TaskError(f"Expected CLASSES of {task.source} to name the {n_outputs} outputs, got {len(classes)} names.")
    try:
        in_order = conditions(*loaders_of(task, context, options))
    except ValueError as error:
        raise TaskError(f"The loaders of {task.source}: {error}") from error
    images, first = task.definition.images if task.has("images") else None, {}
    for condition in in_order:
        name = FUNCTIONS[condition.kind]
        with errors_from(task, name):
            (read,) = preflight({MAP: point}, [condition], images)
            if condition.kind != "test":  # of which more is seen
                first[f"{name}: {condition.title}"] = data_digest(read.loader, None)
    return n_outputs, first


def classifier(task: Task, model: nn.Module) -> nn.Module:
    """The network, with an output for each class."""
    return TwoClasses(model).eval() if task.likelihood == "bernoulli" else model


@contextmanager
def errors_from(task: Task, name: str) -> Iterator[None]:
    """Errors about data name the function that they are from."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise TaskError(f"{name}() of {task.source}: {error}") from error
