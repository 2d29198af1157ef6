"""What is compared, and on what: tasks, methods, and how the methods are tuned and judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from debiased_laplace import _data
from debiased_laplace.evaluation import records
from debiased_laplace.sampling import UniformSampler
from debiased_laplace.splits import Single

Batch = tuple[_data.Inputs, Tensor]


@dataclass(frozen=True)
class Task:
    """A trained classifier and the data it is judged on.

    Attributes:
        name: Short name.
        description: What the data and the model are, in one or two sentences.
        model: Gives the trained model on a device; called once.
        train: Gives a fresh iterable of the training batches every time it is called.
        validation: Likewise, of the data the prior precision is tuned on.
        tests: Inputs and targets of every condition; the first one is unshifted.
        ood: Inputs of another kind, for each kind; compared with the first condition.
        n_data: Size of the training set.
        notes: How each condition and each other kind of data was made.
        seeds: What a seed decides, and so what a standard error over seeds speaks about.
    """

    name: str
    description: str
    model: Callable[[torch.device], nn.Module]
    train: Callable[[], Iterable[Batch]]
    validation: Callable[[], Iterable[Batch]]
    tests: Mapping[str, Batch]
    ood: Mapping[str, _data.Inputs]
    n_data: int
    notes: Mapping[str, str] = field(default_factory=dict)
    seeds: str = ""


@dataclass(frozen=True)
class Method:
    """What is compared.

    Attributes:
        name: As it appears in tables.
        kind: ``"map"`` (softmax), ``"temperature"`` (softmax of outputs divided by one number, tuned on
            the validation data) or ``"laplace"``.
        fit: Arguments of :meth:`~debiased_laplace.laplace_torch.DebiasedLaplace.fit`.
        role: The ``candidate`` is compared with the ``baseline``; the ``reference`` is what both estimate.
        description: One sentence.
    """

    name: str
    kind: Literal["map", "temperature", "laplace"] = "laplace"
    fit: Mapping[str, Any] = field(default_factory=dict)
    role: Literal["", "baseline", "candidate", "reference"] = ""
    description: str = ""


@dataclass(frozen=True)
class Options:
    """How methods are tuned and judged; the same for all of them.

    Attributes:
        link_approx: Link of tuning and of predictions.
        grid_size: Number of prior precisions tried.
        log_prior_prec_min: Decimal exponent of the smallest.
        log_prior_prec_max: Of the largest.
        batch_size: Data predicted at a time.
        distance_inputs: Number of unshifted test inputs for the distance to the reference; ``None`` for all.
        distance_prior_precisions: Prior precisions at which the distance is measured, besides the one
            that was tuned for the reference.
    """

    link_approx: str = "probit"
    grid_size: int = 71
    log_prior_prec_min: float = -2.0
    log_prior_prec_max: float = 5.0
    batch_size: int = 250
    distance_inputs: int | None = None
    distance_prior_precisions: tuple[float, ...] = (1.0,)


def standard_methods(budget: int) -> tuple[Method, ...]:
    """MAP, temperature scaling, and K-FAC from one batch, debiased, and from all the data.

    Args:
        budget: Training data spent on curvature by each of the two mini-batch methods, all told.
    """
    return (
        Method("MAP", "map", description="The trained network's softmax; no posterior."),
        Method(
            "temperature scaling", "temperature",
            description="Softmax of the outputs divided by one number, tuned on the validation data.",
        ),
        Method(
            "single-batch K-FAC", fit={"sampler": UniformSampler(budget), "split": Single()}, role="baseline",
            description=f"Directions and curvatures from the same {budget} random training data: the usual practice.",
        ),
        Method(
            "debiased K-FAC", fit={"budget": budget}, role="candidate",
            description=f"{budget} training data chosen by importance, each for directions and for curvatures along "
            "those of others.",
        ),
        Method(
            "full-data K-FAC", fit={"split": Single(), "budget": None}, role="reference",
            description="Directions and curvatures from all training data: what the two above estimate.",
        ),
    )  # fmt: skip


def settings_of(methods: Sequence[Method], options: Options, device: torch.device, **task: Any) -> dict[str, Any]:
    """Everything that decides the numbers of a record but the seed; records are reused only if it is equal."""
    software = records.versions()
    return records.jsonable(
        {
            **task,
            "methods": [{"name": m.name, "kind": m.kind, "role": m.role, "fit": m.fit} for m in methods],
            "options": asdict(options),
            "device": str(device),
            "software": {name: software[name] for name in ("debiased_laplace", "torch")},
        }
    )


def check_methods(methods: Sequence[Method]) -> None:
    """Raise a ``ValueError`` unless names and roles are unique and roles belong to posteriors."""
    names = [method.name for method in methods]
    roles = [method.role for method in methods if method.role]
    if len(set(names)) != len(names) or len(set(roles)) != len(roles):
        raise ValueError(f"Expected different names and at most one method of each role, got {names} and {roles}.")
    misplaced = [method.name for method in methods if method.role and method.kind != "laplace"]
    if misplaced:
        raise ValueError(f"Expected roles for methods of kind 'laplace' alone, got one for {misplaced}.")
