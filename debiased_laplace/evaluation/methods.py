"""What an evaluation compares, and how it is tuned and judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from debiased_laplace.evaluation.names import check_name
from debiased_laplace.evaluation.tasks import Task
from debiased_laplace.sampling.samplers import PrioritySampler, UniformSampler
from debiased_laplace.sampling.splits import Single

MAP, TEMPERATURE, TEMPERATURE_RULE = "MAP", "temperature scaling", "temperature, one standard error"
ISOTROPIC, ENSEMBLE = "identity curvature", "deep ensemble"
#: What a posterior is compared with that has none.
POINTS = (MAP, TEMPERATURE, TEMPERATURE_RULE)
#: How posteriors of classifiers are tuned, for the reasons in docs/results.md: as much uncertainty as the validation
#: data allow, with a temperature, and the covariance of the outputs.
RECIPE = {"link_approx": "mean_field", "tune_temperature": True, "selection": "one_standard_error"}
#: And of one logit, whose probit is what the mean-field link is for two classes.
LOGIT_RECIPE = {"link_approx": "probit", "tune_temperature": True, "selection": "one_standard_error"}
#: And those of regressions.
NOISE_RECIPE = {"tune_sigma_noise": True}
#: The recipes' other rule, which every method that has the first is given too.
BEST = {"selection": "best"}
#: Tasks on which the recipes were chosen (``eval/links.py``): what they gain there is no evidence for them.
CHOSEN_ON = ("digits", "Fashion-MNIST, LeNet", "CIFAR-10, ResNet-20")
Role = Literal["", "baseline", "candidate", "reference"]


@dataclass(frozen=True)
class Method:
    """A way to predict.

    Attributes:
        name: As it appears in tables.
        kind: ``"map"``, ``"temperature"``, ``"ensemble"``, ``"laplace"``, or ``"laplace-torch"``.
        laplace: What the posterior is, as :class:`~debiased_laplace.DebiasedLaplace` and ``laplace.Laplace`` name it.
        fit: Arguments of its ``fit``; methods with equal ones share the fit.
        tune: Further arguments of its ``optimize_prior_precision``; of a temperature ``selection``.
        seconds_of: A method whose fit takes as long as this one's shall: the budget is what fits into that time.
        role: The ``candidate`` is compared with the ``baseline``; the ``reference`` is what both estimate.
        description: One sentence.
    """

    name: str
    kind: Literal["map", "temperature", "ensemble", "laplace", "laplace-torch"] = "laplace"
    laplace: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Any] = field(default_factory=dict)
    seconds_of: str = ""
    role: Role = ""
    description: str = ""

    @property
    def fit_key(self) -> str:
        """Equal for methods that share a fit."""
        settings = sorted(self.laplace.items()), sorted(self.fit.items(), key=str)
        return repr((*settings, self.seconds_of) if self.seconds_of else settings)

    @property
    def is_random(self) -> bool:
        """Whether a part of the training data is drawn for its curvature."""
        all_data = self.fit.get("budget", 1024) is None and "sampler" not in self.fit
        return self.kind == "laplace" and not all_data and self.laplace.get("hessian_structure") != "isotropic"


@dataclass(frozen=True)
class Options:
    """How methods are tuned and judged; the same for all of them.

    Attributes:
        grid_size: Number of prior precisions tried.
        log_prior_prec_min: Decimal exponent of the smallest.
        log_prior_prec_max: Of the largest.
        n_resamples: Bootstrap resamples.
        distance_inputs: Number of test inputs for the distance to the reference.
        distance_prior_precision: Prior precision at which it is measured, besides the reference's tuned one.
        conditions: Titles of the shifted and out-of-distribution data to use, such as ``"noise 3"``; ``None`` for all.
        n_shifted: Of each of these the first so many; ``None`` for all.
        draws: How often the data of a method that draws some are drawn, for each seed; scores are means over draws.
    """

    grid_size: int = 46
    log_prior_prec_min: float = -3.0
    log_prior_prec_max: float = 6.0
    n_resamples: int = 1000
    distance_inputs: int = 500
    distance_prior_precision: float = 1.0
    conditions: tuple[str, ...] | None = None
    n_shifted: int | None = None
    draws: int = 1

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"Expected at least one draw, got draws={self.draws}.")

    @property
    def search(self) -> dict[str, Any]:
        """Arguments of ``optimize_prior_precision`` for the search of the prior precision."""
        return {
            "method": "gridsearch", "grid_size": self.grid_size, "log_prior_prec_min": self.log_prior_prec_min,
            "log_prior_prec_max": self.log_prior_prec_max,
        }  # fmt: skip

    @property
    def grid(self) -> Tensor:
        """The prior precisions of that search, ``[R]``, float64."""
        return torch.logspace(self.log_prior_prec_min, self.log_prior_prec_max, self.grid_size, dtype=torch.float64)


def recipe(likelihood: str) -> dict[str, Any]:
    """Further arguments of ``optimize_prior_precision``: how posteriors of a task's likelihood are tuned."""
    recipes: dict[str, dict[str, Any]] = {"regression": NOISE_RECIPE, "bernoulli": LOGIT_RECIPE}
    return recipes.get(likelihood, RECIPE)


def is_variant(name: str) -> bool:
    """Whether a standard method is another one tuned to the smallest validation loss, or a further single batch."""
    return name.endswith(", best") or name.startswith("single batch,")


def methods_of(task: Task, *, equal_seconds: bool = False) -> tuple[Method, ...]:
    """:func:`standard_methods` for a task."""
    return standard_methods(
        task.budget, likelihood=task.likelihood, ensemble=task.has("ensemble"),
        dense=bool(task.constant("DENSE", False)), equal_seconds=equal_seconds,
    )  # fmt: skip


def standard_methods(
    budget: int,
    *,
    likelihood: str = "classification",
    ensemble: bool = False,
    dense: bool = False,
    equal_seconds: bool = False,
) -> tuple[Method, ...]:
    """The baselines nobody may leave out, and K-FAC from one batch, debiased, and from all the data.

    Args:
        budget: Training data spent on curvature by each mini-batch method, all told.
        likelihood: ``"classification"``, ``"regression"`` or ``"bernoulli"``.
        ensemble: Whether the task has networks of several runs.
        dense: Whether the network is small enough for the whole curvature matrix.
        equal_seconds: Whether a single batch is to take as long as the debiased fit. What it draws then depends on the
            clock, so that its scores are never quite the same again.
    """
    single = {"sampler": UniformSampler(budget), "split": Single()}
    full = {"budget": None}
    last = {"subset_of_weights": "last_layer", "hessian_structure": "full"}
    tuned = recipe(likelihood)
    one = Method(
        "single-batch K-FAC", fit=single, tune=tuned, role="baseline",
        description=f"Directions and curvatures from the same {budget} random training data: the usual practice.",
    )  # fmt: skip
    isotropic = Method(
        ISOTROPIC, laplace={"hessian_structure": "isotropic"}, fit={"budget": 1}, tune=tuned,
        description="The prior alone as posterior, with one number to tune and no training data: what a curvature has "
        "to beat.",
    )  # fmt: skip
    debiased = Method(
        "debiased K-FAC", fit={"budget": budget}, tune=tuned, role="candidate",
        description=f"{budget} training data chosen by importance; for the data not drawn they measure curvature only "
        "along directions that they had no part in.",
    )  # fmt: skip
    common = (
        Method(
            "last-layer Laplace", laplace=last, fit=full, tune=tuned,
            description="A posterior over the last layer alone, dense curvature from all training data.",
        ),
        Method(
            "laplace-torch", "laplace-torch", laplace={"structure": "full" if dense else "kron"},
            description="laplace-torch's posterior from all training data, "
            + ("dense, over all layers." if dense else "over all layers if it can, else the last one."),
        ),
        isotropic,
        one,
        debiased,
        Method(
            "full-data K-FAC", fit=full, tune=tuned, role="reference",
            description="Directions and curvatures from all training data: what single batches and the debiased fit "
            "estimate.",
        ),
    )  # fmt: skip
    timed: tuple[Method, ...] = ()
    if equal_seconds:
        timed = (
            Method(
                "single batch, equal seconds", fit={"split": Single()}, tune=tuned, seconds_of=debiased.name,
                description="As many random training data as fit into the seconds of the debiased fit.",
            ),
        )  # fmt: skip
    whole: tuple[Method, ...] = ()
    if dense:
        whole = (
            Method(
                "debiased, dense", laplace={"hessian_structure": "full"}, fit={"budget": budget}, tune=tuned,
                description=f"The whole curvature matrix, from {budget} training data in the same way.",
            ),
            Method(
                "full-data, dense", laplace={"hessian_structure": "full"}, fit=full, tune=tuned,
                description="The whole curvature matrix, from all training data.",
            ),
        )  # fmt: skip
    members: tuple[Method, ...] = ()
    if ensemble:
        members = (Method(ENSEMBLE, "ensemble", description="The mean of networks trained from other random starts."),)
    if likelihood == "regression":
        point = Method(MAP, "map", description="The network's output and one noise variance, tuned on validation data.")
        return (point, *common, *timed, *whole, *members)
    points = (
        Method(MAP, "map", description="The trained network's softmax; no posterior."),
        Method(
            TEMPERATURE, "temperature",
            description="Softmax of the outputs divided by one number, tuned on the validation data.",
        ),
        Method(
            TEMPERATURE_RULE, "temperature", tune={"selection": "one_standard_error"},
            description="The same with the largest number that the validation data do not tell from the best.",
        ),
    )  # fmt: skip
    variants = (
        Method(
            "single batch, importance", fit={"sampler": PrioritySampler(budget), "split": Single()}, tune=tuned,
            description=f"{budget} training data chosen by importance, all for directions and curvatures at once.",
        ),
        *(
            replace(method, name=f"{method.name}, best", tune=tuned | BEST, role="",
                    description=f"{method.name}, tuned to the smallest validation loss.")
            for method in (isotropic, one, debiased)
        ),
        Method(
            "debiased, probit", fit={"budget": budget},
            description="The debiased posterior as laplace-torch would tune it: probit, the best prior precision, no "
            "temperature.",
        ),
        Method(
            "debiased, layers", fit={"budget": budget}, tune={"prior_structure": "layerwise", "tune_temperature": True},
            description="The same with a prior precision for every layer and a temperature, tuned together.",
        ),
    )  # fmt: skip
    return (*points, *common, *timed, *variants, *whole, *members)


def check_methods(methods: Sequence[Method]) -> None:
    """Raise a ``ValueError`` unless names and roles are unique and roles belong to posteriors."""
    names = [check_name(method.name, "a method") for method in methods]
    roles = [method.role for method in methods if method.role]
    if len(set(names)) != len(names) or len(set(roles)) != len(roles):
        raise ValueError(f"Expected different names and at most one method of each role, got {names} and {roles}.")
    misplaced = [method.name for method in methods if method.role and method.kind != "laplace"]
    if misplaced:
        raise ValueError(f"Expected roles for methods of kind 'laplace' alone, got one for {misplaced}.")
    for index, method in enumerate(methods):
        before = {other.name for other in methods[:index] if other.kind == "laplace"}
        if method.seconds_of and (method.kind != "laplace" or method.seconds_of not in before):
            raise ValueError(
                f"Expected {method.name!r} to take the seconds of a posterior before it out of {sorted(before)}, got "
                f"seconds_of={method.seconds_of!r}."
            )
