"""How far the log marginal likelihood of a low rank is from that of all directions, and its bounds.

    python eval/low_rank_evidence.py [--quick] [--docs docs]

A small network, so that the dense curvature is there to compare with. Writes ``<docs>/records/low_rank_evidence.json``
and fills the table of ``docs/evidence.md`` between ``<!-- low ranks -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from documents import fill, markdown
from torch import nn

from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.structures import LowRank
from debiased_laplace.evaluation.records import read_json, write_json

N_TRAIN, RANKS, BUDGET = (100, 400, 1500), (5, 20, 80), 64


def trained(n: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network with 131 parameters and its n training data, three classes."""
    torch.manual_seed(0)
    x = torch.randn(n, 4).double()
    y = (x @ torch.randn(4, 3).double() + 0.5 * torch.randn(n, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


def measure(n: int, ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    """Log marginal likelihoods in nats: of a rank, its bounds, those from a few data, and of all directions."""
    model, x, y = trained(n)
    full = DebiasedLaplace(model, "classification", hessian_structure="full")
    full.fit([(x, y)], budget=None)
    rows = []
    for rank in ranks:
        row: dict[str, Any] = {"n": n, "rank": rank, "full": float(full.log_marginal_likelihood())}
        for name, budget in (("all", None), ("few", BUDGET)):
            la = DebiasedLaplace(model, "classification", hessian_structure="lowrank")
            la.fit([(x, y)], budget=budget, structure=LowRank(rank))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = float(la.log_marginal_likelihood())
            row[name] = [float(f"{number:.5g}") for number in (value, *la.log_marginal_likelihood_bounds())]
        rows.append(row)
    return rows


def table(record: Mapping[str, Any]) -> str:
    """A row for every size and rank."""

    def nats(value: float) -> str:
        return f"{value:.0f}".replace("-", "\N{MINUS SIGN}")

    rows = [
        [
            str(row["n"]), str(row["rank"]), nats(row["all"][0]),
            *(" to ".join(map(nats, row[name][1:])) for name in ("all", "few")), nats(row["full"]),
        ]
        for row in record["rows"]
    ]  # fmt: skip
    few = f"bounds from {record['budget']} data"
    return markdown(["training data", "rank", "low rank", "its bounds", few, "all directions"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size and rank")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    sizes, ranks = (N_TRAIN[:1], RANKS[:1]) if options.quick else (N_TRAIN, RANKS)
    path = options.docs / "records" / "low_rank_evidence.json"
    n_parameters = sum(p.numel() for p in trained(sizes[0])[0].parameters())
    write_json(
        path, {"parameters": n_parameters, "budget": BUDGET, "rows": [row for n in sizes for row in measure(n, ranks)]}
    )
    fill(options.docs / "evidence.md", {"low ranks": table(read_json(path))})


if __name__ == "__main__":
    main()
