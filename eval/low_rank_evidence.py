"""How far the log marginal likelihood of a low rank is from that of all directions, and its bounds.

    python eval/low_rank_evidence.py

prints the table of docs/evidence.md; a small network, so that the dense curvature is there to compare with.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from debiased_laplace import DebiasedLaplace
from debiased_laplace.curvature.structures import LowRank


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


def main() -> None:
    print("| training data | rank | low rank | its bounds | bounds from 64 data | all directions |")
    print("| --- | --- | --- | --- | --- | --- |")
    for n in (100, 400, 1500):
        model, x, y = trained(n)
        full = DebiasedLaplace(model, "classification", hessian_structure="full")
        full.fit([(x, y)], budget=None)
        for rank in (5, 20, 80):
            cells = []
            for budget in (None, 64):
                la = DebiasedLaplace(model, "classification", hessian_structure="lowrank")
                la.fit([(x, y)], budget=budget, structure=LowRank(rank))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    cells.append(float(la.log_marginal_likelihood()))
                cells.append("{:.0f} to {:.0f}".format(*la.log_marginal_likelihood_bounds()))
            value = float(full.log_marginal_likelihood())
            print(f"| {n} | {rank} | {cells[0]:.0f} | {cells[1]} | {cells[3]} | {value:.0f} |")


if __name__ == "__main__":
    main()
