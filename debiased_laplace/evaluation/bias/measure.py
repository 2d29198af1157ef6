"""The instruments on a task's network and training data, part by part; a part that is complete is kept.

Letters as in :mod:`debiased_laplace.quadratic.instruments`: m data in a batch, B batches, K directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from debiased_laplace import _data, _store
from debiased_laplace.evaluation import records
from debiased_laplace.evaluation.names import locked
from debiased_laplace.evaluation.provenance import network_digest, seeded
from debiased_laplace.evaluation.suite.subject import base_settings
from debiased_laplace.evaluation.tasks import Context, Task
from debiased_laplace.quadratic.instruments import (
    BatchSizeCurve,
    Subsets,
    alignment,
    bias_against_batch_size,
    directional_bias,
    plane,
    signal_to_noise,
    suggest_batch_size,
)
from debiased_laplace.quadratic.optim import conjugate_gradients
from debiased_laplace.quadratic.quadratic import KINDS, Quadratic
from debiased_laplace.sampling.samplers import UniformSampler

__all__ = ["BiasOptions", "study"]

SCHEMA_VERSION = 2
#: Batches that are drawn, as in the paper; all of them are in the numbers.
N_SHOWN = 3

#: Told how many parts are finished, of how many, and what begins.
OnProgress = Callable[[int, int, str], None]
Record = dict[str, Any]


@dataclass(frozen=True)
class BiasOptions:
    """How much to measure.

    Attributes:
        batch_size: m.
        n_batches: B, at least three, so that a second batch has a standard error.
        n_directions: K.
        n_steps: Of conjugate gradients on every batch.
        pool: At most so many training data are kept, drawn at random from all of them; batches come from these.
        reference: So many of them stand for all data.
        sizes: Of the batches whose bias is compared; by default m and a half, a quarter and an eighth of it, as far as
            they have enough directions.
        n_size_directions: How many directions these have.
        n_vectors: Random vectors for the isotropic noise.
        curvature: ``"ggn"`` or ``"hessian"``.
        chunk_size: Data that go through the network at a time.

    Raises:
        ValueError: For too few batches, data or directions.
    """

    batch_size: int = 128
    n_batches: int = 5
    n_directions: int = 10
    n_steps: int = 10
    pool: int = 10_000
    reference: int = 2_000
    sizes: tuple[int, ...] = ()
    n_size_directions: int = 3
    n_vectors: int = 10
    curvature: str = "ggn"
    chunk_size: int = 250

    def __post_init__(self) -> None:
        if self.n_batches < 3:
            raise ValueError(
                f"Expected at least three batches, so that a second one has a standard error, got {self.n_batches}."
            )
        if self.curvature not in KINDS:
            raise ValueError(f"Expected a curvature out of {list(KINDS)}, got {self.curvature!r}.")
        values = asdict(self)
        for name in ("batch_size", "n_steps", "pool", "reference", "n_size_directions", "n_vectors", "chunk_size"):
            if values[name] < 1:
                raise ValueError(f"Expected {name} to be at least one, got {values[name]}.")
        if self.n_directions < 2:
            raise ValueError(f"Expected at least two directions, which span a plane, got {self.n_directions}.")

    @property
    def all_sizes(self) -> tuple[int, ...]:
        """Sizes to compare, ascending."""
        fractions = {self.batch_size // part for part in (1, 2, 4, 8)}
        enough = {size for size in fractions if size > self.n_size_directions} or {self.batch_size}
        return tuple(sorted(set(self.sizes) or enough))


def study(
    task: Task,
    folder: Path | str,
    context: Context,
    options: BiasOptions | None = None,
    *,
    tolerance: float = 0.1,
    progress: OnProgress = lambda finished, total, step: None,
) -> Record:
    """Measure the bias of mini-batches on a task.

    Args:
        task: Its ``model`` and ``train_loader`` are used, nothing else.
        folder: Complete parts are kept in its ``records`` folder, and used again when the network, the data that were
            drawn, and everything else that decides the numbers are the same.
        context: For the task's functions; its seed decides all draws.
        options: How much to measure.
        tolerance: Of the suggested batch size: an overstatement by this share.
        progress: Called with the number of finished parts, of all parts, and what begins.

    Returns:
        Numbers, lists and dictionaries, as they are in ``bias.json``, and ``kept``: how many parts were there already.

    Raises:
        ValueError: If there are too few data, or a batch is too small for the directions.
        NonFiniteError: If a loss, a gradient or a curvature is not finite.
    """
    options, folder = options or BiasOptions(), Path(folder)
    with locked(folder), seeded(context.seed):
        progress(0, 1, "model and data")
        bench = _Bench(task, context, options)
        settings = base_settings(task, context) | {
            "data": bench.fingerprint,
            "bias": records.jsonable(asdict(options)), "bias_schema": SCHEMA_VERSION, "seed": context.seed,
            "network": network_digest(bench.model),
        }  # fmt: skip
        parts: dict[str, tuple[str, Callable[[], Record]]] = {
            "directions": ("slopes and curvatures along the batches' directions", bench.directions),
            "steps": ("conjugate gradients", bench.steps),
            **{
                f"size-{size}": (f"batches of {size}", lambda size=size: bench.at_size(size))  # type: ignore[misc]
                for size in options.all_sizes
            },
        }
        measured: dict[str, Record] = {}
        environments: list[Record] = []
        made: dict[str, str] = {}
        kept = 0
        for finished, (name, (title, make)) in enumerate(parts.items()):
            path = folder / "records" / f"bias-{name}-{records.digest(settings)}.json"
            record = records.read_record(path, {"settings": settings})
            kept += record is not None
            if record is None:
                progress(finished, len(parts), title)
                part = {"environment": records.environment(context.device)} | make()
                record = {"settings": settings, "made": records.now(), "part": part}
                records.write_record(path, record)
            part, made[name] = record["part"], record["made"]
            environment = part.pop("environment")
            environments += [] if environment in environments else [environment]
            measured[name] = part
        progress(len(parts), len(parts), "done")
    n_data = task.n_data or bench.n_seen
    curve = BatchSizeCurve.joined([_curve(measured[f"size-{size}"]) for size in options.all_sizes])
    return {
        "schema_version": SCHEMA_VERSION,
        "task": {
            "name": task.name, "description": task.description(context), "n_data": n_data,
            "n_seen": bench.n_seen, "n_pool": bench.n_pool, "n_reference": bench.n_reference,
            "n_parameters": bench.n_params,
        },
        "settings": settings,
        "environments": environments,
        "made": made,
        "kept": kept,
        **measured["directions"],
        "steps": measured["steps"]["steps"],
        "sizes": curve.record() | {"isotropic": [predicted.record() for predicted in curve.predict(curve.noise)]},
        "suggestion": suggest_batch_size(tolerance, curve=curve, population=n_data).record(),
    }  # fmt: skip


class _Bench:
    """A network, its data, and what is measured on them; made when it is asked for."""

    def __init__(self, task: Task, context: Context, options: BiasOptions) -> None:
        self.options, self.likelihood, self.seed = options, task.likelihood, context.seed
        self.model: nn.Module = task.model(context)
        generator = torch.Generator().manual_seed(context.seed)
        sample = UniformSampler(options.pool).draw(task.loader("train_loader", context), 1, generator)
        self.inputs, self.targets = sample.data.inputs, sample.data.targets
        self.n_seen, self.n_pool = sample.n_seen, len(sample.data)
        self.n_reference = min(options.reference, self.n_pool)
        needed = max([options.batch_size * options.n_batches, *(size + 1 for size in options.all_sizes)])
        if needed > self.n_pool:
            raise ValueError(
                f"Expected at least {needed} training data, for {options.n_batches} batches of {options.batch_size} "
                f"that share none and others of {', '.join(map(str, options.all_sizes))}, got {self.n_pool}. "
                "Take fewer or smaller batches, or a larger pool."
            )
        # Independent of each other, so that the reference is an unbiased estimate of the pool for any batch.
        self._for_reference, self._for_batches = (torch.randperm(self.n_pool, generator=generator) for _ in range(2))
        self.n_params = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def fingerprint(self) -> str:
        """Tells training data apart."""
        tensors = {str(i): leaf for i, leaf in enumerate([*_data.tensors(self.inputs), self.targets])}
        return records.digest(_store.fingerprint(tensors) | {"seen": self.n_seen})

    def _quadratic(self, index: Tensor) -> Quadratic:
        return Quadratic(
            self.model, (_data.take(self.inputs, index), self.targets[index.to(self.targets.device)]), self.likelihood,
            self.options.curvature, chunk_size=self.options.chunk_size,
        )  # fmt: skip

    @cached_property
    def reference(self) -> Quadratic:
        return self._quadratic(self._for_reference[: self.n_reference])

    @cached_property
    def batches(self) -> list[Quadratic]:
        parts = self._for_batches.split(self.options.batch_size)[: self.options.n_batches]
        return [self._quadratic(part) for part in parts]

    def directions(self) -> Record:
        """Figures 1 to 3 of the paper, and ViViT's figure 2."""
        k, shown = self.options.n_directions, self.batches[:N_SHOWN]
        pairs = [batch.eigenpairs(k) for batch in shown]
        overlaps = []
        for i, (_, first) in enumerate(pairs[:2]):
            for j, (values, second) in enumerate(pairs):
                overlap = alignment(first, second)
                overlaps.append(
                    overlap.record()
                    | {"first": i, "second": j, "explained": overlap.curvatures(values).tolist(),
                       "curvatures": shown[j].curvature(first).tolist()}
                )  # fmt: skip
        return {
            "directions": directional_bias(self.batches, self.reference, k, population=self.n_pool).record(),
            "alignment": overlaps,
            "planes": [plane(batch, self.reference).record() for batch in shown],
            "noise": {
                "own": signal_to_noise(shown[0], k).record(),
                "other": signal_to_noise(shown[0], k, measured_on=shown[1]).record(),
            },
        }

    def steps(self) -> Record:
        """Figure 4 of the paper: how far every batch, the others and the reference would go; None: no minimum."""
        runs = []
        for batch in self.batches:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # why it stopped is in the record
                path = conjugate_gradients(batch, n_steps=self.options.n_steps)
            sizes, uphill = [], []
            for other in [*(other for other in self.batches if other is not batch), self.reference]:
                slopes, curvatures = path.measure(*other.projected(path.directions))
                uphill.append((slopes > 0).tolist())
                sizes.append(
                    [-s / c if c > 0 else None for s, c in zip(slopes.tolist(), curvatures.tolist(), strict=True)]
                )
            runs.append(
                {"own": path.step_sizes.tolist(), "others": sizes[:-1], "reference": sizes[-1],
                 "uphill": {"others": uphill[:-1], "reference": uphill[-1]}, "stopped": path.stopped.value}
            )  # fmt: skip
        return {"steps": runs}

    def at_size(self, size: int) -> Record:
        """Bias of batches of one size; the fields of a :class:`BatchSizeCurve`."""
        seed = 1000 * (self.seed + 1) + size
        curve = bias_against_batch_size(
            self.model, Subsets(self.inputs, self.targets, seed), self.likelihood, [size], reference=self.reference,
            n_batches=self.options.n_batches, n_directions=self.options.n_size_directions,
            n_vectors=self.options.n_vectors, chunk_size=self.options.chunk_size, generator=seed,
        )  # fmt: skip
        fields = curve.record()
        return {name: fields[name] for name in vars(curve)}


def _curve(part: Record) -> BatchSizeCurve:
    return BatchSizeCurve(
        **{
            name: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
            for name, value in part.items()
        }
        | {"sizes": tuple(part["sizes"])}
    )
