"""Two ways to share weights in K-FAC, expand and reduce: which is closer to the exact posterior of a Transformer?

    python eval/sharing.py --data-dir <folder> [--networks vit trec] [--seeds 5]
    python eval/report.py

For each seed some data of the pool of ``eval/fidelity.py`` stand for all. The reference is the posterior of their whole
Gauss-Newton matrix, by the matrix of inner products of its square root, which is as large as data times outputs:
nothing is approximated. K-FAC sees the same data, all of them, in both roles. One record for each seed, in
``<out>/sharing``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from fidelity import LIKELIHOOD, PROBLEMS, Problem, write
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from debiased_laplace.curvature.sharing import Expand, Reduce
from debiased_laplace.curvature.structures import Kronecker
from debiased_laplace.fitting.checkpoint import Checkpoint
from debiased_laplace.fitting.measurement import Measurement
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.sampling.samplers import UniformSampler
from debiased_laplace.sampling.splits import Single

SHARINGS = {"expand": Expand(), "reduce": Reduce()}
ESTIMATORS = ("projected", "factored")
PRIORS = (1.0, 100.0, 10_000.0)
N_TEST = 100


def jacobians(model: nn.Module, inputs: Tensor) -> Tensor:
    """Of the outputs in all parameters, ``[N, C, D]``."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def of_datum(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],))[0]

    with sdpa_kernel(SDPBackend.MATH):
        of_data = torch.func.vmap(torch.func.jacrev(of_datum), (None, 0), chunk_size=32)(parameters, inputs)
    return torch.cat([of_data[name].flatten(2) for name in parameters], 2).detach()


def exact_variances(problem: Problem, data: tuple[Tensor, Tensor], inputs: Tensor) -> list[Tensor]:
    r"""Variances of outputs, ``[N, C]``, for each prior precision.

    With V the square root of the Gauss-Newton matrix, :math:`(\delta I + \beta V V^\top)^{-1} = (I - V (V^\top V +
    \delta / \beta\, I)^{-1} V^\top) / \delta`.
    """
    with torch.no_grad():
        outputs = problem.model(data[0])
    roots = LIKELIHOOD.hessian_square_root(outputs, data[1]).to(outputs)  # [V, N, C]
    of_data, of_test = jacobians(problem.model, data[0]), jacobians(problem.model, inputs)
    root = torch.einsum("vnc,ncd->vnd", roots, of_data).flatten(0, 1).double() / len(data[0]) ** 0.5
    of_test = of_test.double()
    along = of_test @ root.mT  # [N, C, VN]
    values, vectors = torch.linalg.eigh(root @ root.mT)
    along, squares = (along @ vectors).square(), of_test.square().sum(-1)
    return [(squares - (along / (values.clamp_min(0) + prior / problem.n_data)).sum(-1)) / prior for prior in PRIORS]


def measure(problem: Problem, seed: int, n_pool: int) -> dict[str, Any]:
    """Errors of all ways, for each prior precision."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(problem.pool[1]), generator=generator)[:n_pool]
    data, inputs = (problem.pool[0][index], problem.pool[1][index]), problem.test[0][:N_TEST]
    exact = exact_variances(problem, data, inputs)
    sample = UniformSampler(None).draw([data], 1, generator)
    network = Network.discover(problem.model, data[0])
    errors: dict[str, Any] = {}
    for name, sharing in SHARINGS.items():
        measurement = Measurement(
            Kronecker(sharing=sharing), network, CurvatureData(network, sample.data, LIKELIHOOD), sample, None,
            Checkpoint(None, {}),
        )  # fmt: skip
        for estimator in ESTIMATORS:
            basis, curvatures = measurement.cross(Single(), factored=estimator == "factored")
            posteriors = [
                Posterior(network.mean(), basis, curvatures, problem.n_data, torch.tensor([prior], dtype=torch.float64))
                for prior in PRIORS
            ]
            _, variances = functional_moments(network, posteriors, inputs, covariance=False)
            ratios = [(v.double() / reference).log() for v, reference in zip(variances, exact, strict=True)]
            errors[f"{name}, {estimator}"] = {
                f"{prior:g}": {"log_ratio": float(ratio.mean()), "abs_log_ratio": float(ratio.abs().mean())}
                for prior, ratio in zip(PRIORS, ratios, strict=True)
            }
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(PROBLEMS), default=["vit", "trec"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pool", type=int, default=256, help="data that stand for all")
    parser.add_argument("--data-dir", type=Path, default=None, help="folder with FashionMNIST/raw and trec")
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    parser.add_argument("--quick", action="store_true", help="a Transformer on digits, 32 data, one seed")
    options = parser.parse_args()
    if options.quick:
        options.networks, options.pool, options.seeds = ["digits-transformer"], 32, 1
    for name in options.networks:
        problem = PROBLEMS[name](options.out / "cache", options.data_dir)
        for seed in range(options.seeds):
            path = options.out / "sharing" / f"{name}.{seed}.json"
            if path.exists():
                continue
            errors = measure(problem, seed, options.pool)
            record = {"network": name, "seed": seed, "n_pool": options.pool, "errors": errors}
            write(path, lambda p, record=record: p.write_text(json.dumps(record, indent=1)))  # type: ignore[misc]
            print(f"{path.stem}: {errors}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
