r"""What ``paper.py`` measures on a trained network: figures 1 to 5 of arXiv 2410.14325, for several batch sizes.

Every batch is a part of the training data D, and batches of one size share none. All that is asked of quadratics along
directions u follows from the changes of the outputs, :math:`z_n = J_n u`, of every datum of D, which one pass gives for
all directions together:

.. math:: u_k^\top g_{\mathcal B} = \frac{1}{|\mathcal B|} \sum_{n \in \mathcal B} (p_n - y_n)^\top z_{nk}, \qquad
    u_k^\top G_{\mathcal B} u_l = \frac{1}{|\mathcal B|} \sum_{n \in \mathcal B} z_{nk}^\top (\mathrm{diag}(p_n) - p_n
    p_n^\top) z_{nl}.

Letters: N data, C classes, D parameters, K directions, M batches of a size.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from paper_networks import Trained, scores
from torch import Tensor, nn

from debiased_laplace import GGN
from debiased_laplace._guards import full_precision
from debiased_laplace.curvature.basis import Basis
from debiased_laplace.curvature.block_gradients import block_gradients
from debiased_laplace.curvature.parts.dense import DenseBasis
from debiased_laplace.curvature.structures.lanczos import largest_eigenpairs
from debiased_laplace.curvature.structures.lowrank import lift_eigenvectors
from debiased_laplace.likelihoods import unit_vectors
from debiased_laplace.network.blocks import unflatten
from debiased_laplace.network.network import Network
from debiased_laplace.quadratic.instruments import Along
from debiased_laplace.quadratic.instruments.estimates import jackknife
from debiased_laplace.quadratic.optim import CGResult, conjugate_gradients
from debiased_laplace.quadratic.quadratic import Quadratic

#: Batches in figures 2 to 4, as in the paper.
N_SHOWN = 3


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        sizes: Of batches.
        shown: The size in figures 1 to 4.
        n_batches: M.
        n_directions: K of every batch.
        n_shown: K in figures 2 and 3.
        n_steps: Of conjugate gradients in figure 4.
        steps_sizes: Data of figure 5 in all, of one batch or of two.
        iterations: In figure 5.
        evaluated: Training data on which figure 5 is judged.
        memory: Bytes of gradients at a time.
    """

    sizes: tuple[int, ...] = (64, 128, 256, 512, 1024)
    shown: int = 512
    n_batches: int = 5
    n_directions: int = 10
    n_shown: int = 100
    n_steps: int = 10
    steps_sizes: tuple[int, ...] = (1024,)
    iterations: int = 30
    evaluated: int = 2_000
    memory: float = 4e9


QUICK = Extent((16, 32), 32, 3, 3, 8, 3, (32,), 4, 64, 1e9)


# -- directions ------------------------------------------------------------------------------------


def batches_of(n: int, size: int, n_batches: int) -> list[Tensor]:
    """Indices of batches that share no data, the same for every network with as many data."""
    if size * n_batches > n:
        raise SystemExit(f"Expected at least {size * n_batches} training data, for {n_batches} batches, got {n}.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(size))
    return list(order[: size * n_batches].split(size))


def take(trained: Trained, index: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the training data, on the device."""
    return trained.train[0][index].to(trained.device), trained.train[1][index].to(trained.device)


def chunk_of(trained: Trained, memory: float) -> int:
    """Data at a time whose gradients of all outputs take so much memory."""
    with torch.no_grad():
        n_outputs = trained.model(take(trained, torch.arange(2))[0]).shape[1]
    return max(1, int(memory / (4 * n_outputs * sum(p.numel() for p in trained.model.parameters()))))


def eigenvectors(model: nn.Module, batch: tuple[Tensor, Tensor], k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues ``[k]`` of a batch's Gauss-Newton matrix, and eigenvectors ``[k, D]``, as rows.

    By the Gram matrix, also of batches for which products would take less memory: there they take several times longer.
    """
    ggn = GGN(model, *batch, "classification", chunk_size=chunk)
    network, statistics = ggn.network, ggn.statistics
    (group,) = statistics.groups
    gram = statistics.gram(group)
    precision = torch.finfo(network.dtype).eps
    values, coefficients = largest_eigenpairs(gram, len(gram), k, precision=precision, name="the batch")
    if float(values[-1]) <= 10 * len(gram) ** 0.5 * precision * float(values[0]):
        print(f"The last of {k} eigenvalues of {len(batch[1])} data is within rounding.", flush=True)
    columns = lift_eigenvectors(network, statistics, group, values, coefficients.mT)
    basis = Basis(network.blocks, network.shapes, [DenseBasis(columns)], statistics.groups)
    return values, basis.lift(torch.eye(k, dtype=torch.float64, device=gram.device))


def output_changes(network: Network, inputs: Tensor, rows: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Outputs ``[N, C]`` of data, and their changes along directions ``[K, D]``, ``[N, C, K]``.

    One pass for all directions: gradients of every output, whose cost does not grow with K, times the directions.
    """
    columns = [block.gather(unflatten(rows, network.shapes)).flatten(1).to(network.dtype) for block in network.blocks]
    outputs, changes = [], []
    for part in inputs.split(chunk):
        factors = network.factors(part.to(network.device))
        vectors = factors.backpropagate_all(unit_vectors(factors.outputs))
        total: Tensor | None = None
        for block, g, of_block in zip(network.blocks, vectors, columns, strict=True):
            along = block_gradients(factors.inputs(block), g).rows() @ of_block.mT
            total = along if total is None else total.add_(along)
        assert total is not None
        outputs.append(factors.outputs)
        changes.append(total)
    return torch.cat(outputs), torch.cat(changes)


class Quadratics:
    """The quadratics of any training data along given directions.

    Args:
        outputs: ``[N, C]``.
        targets: ``[N]``.
        changes: ``[N, C, K]``.
    """

    def __init__(self, outputs: Tensor, targets: Tensor, changes: Tensor) -> None:
        self.probabilities = outputs.double().softmax(-1)
        self.residuals = self.probabilities.clone()
        self.residuals[torch.arange(len(targets), device=outputs.device), targets.to(outputs.device)] -= 1
        self.losses = -outputs.double().log_softmax(-1).gather(1, targets.to(outputs.device)[:, None])[:, 0]
        self.changes = changes

    def along(self, columns: slice, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Slopes ``[K]`` and curvatures ``[K, K]`` of some data (all by default) along some of the directions."""
        size = columns.stop - columns.start
        slopes = self.residuals.new_zeros(size)
        matrix = self.residuals.new_zeros(size, size)
        every = torch.arange(len(self.changes)) if index is None else index
        for part in every.to(self.changes.device).split(5_000):
            z, p = self.changes[part, :, columns].double(), self.probabilities[part]
            slopes += torch.einsum("nc,nck->k", self.residuals[part], z)
            centred = (z - torch.einsum("nc,nck->nk", p, z)[:, None]) * p.sqrt()[..., None]
            matrix += centred.flatten(0, 1).mT @ centred.flatten(0, 1)
        return slopes / len(every), matrix / len(every)

    def loss(self, index: Tensor | None = None) -> float:
        """Mean loss of some data."""
        return float((self.losses if index is None else self.losses[index.to(self.losses.device)]).mean())


# -- figures 1 to 4 --------------------------------------------------------------------------------


class Directions:
    """All directions of a network: eigenvectors of batches, and the paths of conjugate gradients on them."""

    def __init__(self, trained: Trained, extent: Extent) -> None:
        self.trained, self.extent, self.chunk = trained, extent, chunk_of(trained, extent.memory)
        self.n = len(trained.train[0])
        self.index = {size: batches_of(self.n, size, extent.n_batches) for size in extent.sizes}
        self.values: dict[int, list[Tensor]] = {}
        self.paths: dict[int, list[CGResult]] = {}
        self.overlaps: dict[int, Tensor] = {}
        self.shown: list[list[Tensor]] = []
        self.places: dict[tuple[str, int, int], slice] = {}
        self._rows: list[Tensor] = []
        with full_precision():
            for size in extent.sizes:
                self._of_size(size)
            rows = torch.cat(self._rows)
            self._rows.clear()
            start = time.perf_counter()
            network = Network.discover(trained.model, take(trained, torch.arange(2))[0])
            outputs, changes = output_changes(network, trained.train[0], rows, self.chunk)
        self.quadratics = Quadratics(outputs, trained.train[1], changes)
        print(f"{len(rows)} directions on {self.n} data: {time.perf_counter() - start:.1f} s", flush=True)

    def _of_size(self, size: int) -> None:
        extent, model = self.extent, self.trained.model
        start = time.perf_counter()
        self.values[size], self.paths[size], whole = [], [], []
        for m, index in enumerate(self.index[size]):
            batch = take(self.trained, index)
            k = extent.n_shown if size == extent.shown and m < N_SHOWN else extent.n_directions
            values, rows = eigenvectors(model, batch, k, self.chunk)
            self.values[size].append(values)
            whole.append(rows)
            self._keep(("eigenvectors", size, m), rows)
            path = descent(Quadratic(model, batch, "classification", chunk_size=size), extent.n_steps)
            self.paths[size].append(path)
            self._keep(("steps", size, m), path.directions / path.directions.norm(dim=1, keepdim=True))
        leading = torch.cat([rows[: extent.n_directions] for rows in whole])
        self.overlaps[size] = (leading @ leading.mT).square()
        if size == extent.shown:
            several = whole[:N_SHOWN]
            self.shown = [[(one @ other.mT).square() for other in several] for one in several[:2]]
        print(f"directions of batches of {size}: {time.perf_counter() - start:.1f} s", flush=True)

    def _keep(self, key: tuple[str, int, int], rows: Tensor) -> None:
        begin = sum(len(each) for each in self._rows)
        self._rows.append(rows.float())
        self.places[key] = slice(begin, begin + len(rows))

    # -- what they say -----------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Of all sizes, and what the figures show."""
        return {
            "n_data": self.n, "loss": self.quadratics.loss(),
            "sizes": {str(size): self.at_size(size) for size in self.extent.sizes},
            "figures": {
                "planes": [self.plane(m) for m in range(self.extent.n_batches)],
                "directions": self.along(self.extent.shown, self.extent.n_shown, range(N_SHOWN)).record_of_figure(),
                "alignment": [[block.tolist() for block in row] for row in self.shown],
                "steps": [self.steps(self.extent.shown, m) for m in range(N_SHOWN)],
            },
        }  # fmt: skip

    def along(self, size: int, k: int, chosen: Sequence[int]) -> SlopesAndCurvatures:
        """Slopes and curvatures of batches, and of all data, along the eigenvectors of batches."""
        slopes, curvatures, all_slopes, all_curvatures = [], [], [], []
        for m in chosen:
            begin = self.places["eigenvectors", size, m].start
            columns = slice(begin, begin + k)
            of_batches = [self.quadratics.along(columns, self.index[size][j]) for j in chosen]
            slope, matrix = self.quadratics.along(columns)
            signs = torch.where(of_batches[list(chosen).index(m)][0] < 0, -1.0, 1.0)
            slopes.append(torch.stack([signs * s for s, _ in of_batches]))
            curvatures.append(torch.stack([c.diagonal() for _, c in of_batches]))
            all_slopes.append(signs * slope)
            all_curvatures.append(matrix.diagonal())
        share = size / self.n
        return SlopesAndCurvatures(
            Along(torch.stack(slopes).cpu(), torch.stack(all_slopes).cpu(), share),
            Along(torch.stack(curvatures).cpu(), torch.stack(all_curvatures).cpu(), share),
        )

    def at_size(self, size: int) -> dict[str, Any]:
        """The bias of batches of a size."""
        k, count = self.extent.n_directions, self.extent.n_batches
        along = self.along(size, k, range(count))
        between = self.overlaps[size].view(count, k, count, k).sum(3).mean(1)  # of m's directions in j's span
        others = between.masked_select(~torch.eye(count, dtype=torch.bool, device=between.device))
        steps = [self.steps(size, m) for m in range(count)]
        return along.record() | {
            "within_span": {"value": float(others.mean()), "of_batches": others.view(count, -1).mean(1).tolist()},
            "steps": [
                {"taken": len(run["own"]), "uphill": sum(run["uphill"]),
                 "own": run["own"], "data": run["data"], "stopped": run["stopped"],
                 "second_agrees": float(np.mean([of == run["uphill"] for of in run["uphill_others"]]) if run["own"]
                                        else 0.0)}
                for run in steps
            ],
        }  # fmt: skip

    def plane(self, m: int) -> dict[str, Any]:
        """Figure 1: the quadratics of a batch and of all data on the plane of its top two eigenvectors."""
        begin, index = self.places["eigenvectors", self.extent.shown, m].start, self.index[self.extent.shown][m]
        columns = slice(begin, begin + 2)
        result = {}
        for name, of in (("batch", index), ("data", None)):
            slopes, matrix = self.quadratics.along(columns, of)
            minimum = -torch.linalg.solve(matrix, slopes)
            result[name] = {
                "offset": self.quadratics.loss(of), "slopes": slopes.tolist(), "curvatures": matrix.tolist(),
                "minimum": minimum.tolist(), "step": float(minimum.norm()),
            }  # fmt: skip
        return result

    def steps(self, size: int, m: int) -> dict[str, Any]:
        """Figure 4: how far a batch, the others and all data would go on the path of conjugate gradients on it."""
        path, place = self.paths[size][m], self.places["steps", size, m]
        lengths = path.directions.norm(dim=1)

        def on(index: Tensor | None) -> tuple[Tensor, Tensor]:
            slopes, matrix = self.quadratics.along(place, index)
            return path.measure(slopes * lengths, matrix * lengths[:, None] * lengths)

        slopes, curvatures = on(None)
        others = [on(index) for j, index in enumerate(self.index[size]) if j != m]
        return {
            "own": path.step_sizes.tolist(), "data": (-slopes / curvatures).tolist(),
            "others": [(-s / c).tolist() for s, c in others],
            "uphill": (slopes > 0).tolist(), "uphill_others": [(s > 0).tolist() for s, _ in others],
            "stopped": path.stopped.value,
        }  # fmt: skip


@dataclass(frozen=True)
class SlopesAndCurvatures:
    """Along eigenvectors of batches, which point uphill on their own batch."""

    slopes: Along
    curvatures: Along

    def record(self) -> dict[str, Any]:
        """Ratios, with jackknife errors over batches."""
        names = ("ratio_own", "typical_ratio_own", "typical_ratio_other", "total_ratio_own")
        own, reference = self.slopes.own.sum(1), self.slopes.reference.sum(1)
        of_data = jackknife(lambda chosen: reference[chosen].sum() / own[chosen].sum(), len(own))
        uphill = int((self.slopes.reference > 0).sum())
        return {name: getattr(self.curvatures, name).record() for name in names} | {
            "slopes_data": of_data.record(),
            "uphill": uphill,
            "of": self.slopes.reference.numel(),
        }

    def record_of_figure(self) -> dict[str, Any]:
        """All numbers."""
        return {
            name: {"batches": along.batches.tolist(), "data": along.reference.tolist()}
            for name, along in (("slopes", self.slopes), ("curvatures", self.curvatures))
        }


def descent(first: Quadratic, n_steps: int, second: Quadratic | None = None, **settings: Any) -> CGResult:
    """Conjugate gradients without damping; why they stopped is in the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return conjugate_gradients(first, second, n_steps=n_steps, **settings)


# -- figure 5 --------------------------------------------------------------------------------------


def figure5(trained: Trained, extent: Extent) -> dict[str, Any]:
    """Loss and accuracy along paths of conjugate gradients, with one batch and with two halves of it."""
    some = torch.randperm(len(trained.train[0]), generator=torch.Generator().manual_seed(5))[: extent.evaluated]
    sets = {"train": take(trained, some), "test": tuple(part.to(trained.device) for part in trained.test)}
    start_at = nn.utils.parameters_to_vector(trained.model.parameters()).detach()
    record: dict[str, Any] = {"n_train": len(some), "n_test": len(trained.test[0]), "sizes": {}}
    for size in extent.steps_sizes:
        start = time.perf_counter()
        runs: dict[str, list[Any]] = {"one batch": [], "two batches": []}
        for index in batches_of(len(trained.train[0]), size, extent.n_batches):
            half = len(index) // 2
            for name, parts in (("one batch", [index]), ("two batches", [index[:half], index[half:]])):
                with full_precision():
                    quadratics = [
                        Quadratic(trained.model, take(trained, part), "classification", chunk_size=size)
                        for part in parts
                    ]
                    path = descent(quadratics[0], extent.iterations, *quadratics[1:], tolerance=0.0)
                curves: dict[str, Any] = {part: {"loss": [], "accuracy": []} for part in sets}
                for point in path.path:
                    nn.utils.vector_to_parameters(start_at + point.to(start_at), trained.model.parameters())
                    for part, data in sets.items():
                        for key, number in zip(("loss", "accuracy"), scores(trained.model, data), strict=True):
                            curves[part][key].append(number)
                nn.utils.vector_to_parameters(start_at, trained.model.parameters())
                runs[name].append(curves | {"stopped": path.stopped.value})
        record["sizes"][str(size)] = runs
        print(f"figure 5, {size} data: {time.perf_counter() - start:.1f} s", flush=True)
    return record
