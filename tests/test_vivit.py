"""ViViT's own implementation as an oracle: spectrum, eigenvectors, slopes and curvatures of every datum.

It was written for an older torch: the one removed function that it calls is given back while it runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import backpack
import pytest
import torch
import vivit
from torch import Tensor, nn

from debiased_laplace import GGN, LowRank
from debiased_laplace.testing import dense_basis
from tests.tolerances import assert_equal

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Some eigenv:UserWarning"),
]


@pytest.fixture(autouse=True)
def symeig(monkeypatch: pytest.MonkeyPatch) -> None:
    """``Tensor.symeig``, which torch 2 has no more."""

    def decompose(self: Tensor, eigenvectors: bool = False) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self)
        return values, vectors if eigenvectors else self.new_empty(0)

    monkeypatch.setattr(Tensor, "symeig", decompose, raising=False)


def convolutional() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(3, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    return model.double(), torch.randn(7, 2, 4, 4).double()


def dense() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(6, 4).double()


@pytest.fixture(params=["convolutional", "dense"])
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    return {"convolutional": convolutional, "dense": dense}[request.param]()


@pytest.fixture(params=["classification", "regression"])
def problem(request: pytest.FixtureRequest, network: tuple[nn.Module, Tensor]) -> Iterator[tuple]:
    """Model, inputs, targets, the likelihood's name, its loss, and the loss's factor: the mean of squared errors."""
    model, inputs = network
    n = len(inputs)
    if request.param == "classification":
        yield model, inputs, torch.arange(n) % 3, request.param, nn.CrossEntropyLoss(), 1.0
    else:
        targets = torch.linspace(-1, 1, 3 * n, dtype=torch.float64).reshape(n, 3)
        yield model, inputs, targets, request.param, nn.MSELoss(), 2 / 3


def run(computation, model: nn.Module, inputs: Tensor, targets: Tensor, loss: nn.Module, groups) -> list:
    """One backward pass; ``groups`` makes parameter groups from the parameters of the extended copy."""
    extended, extended_loss = backpack.extend(copy.deepcopy(model)), backpack.extend(copy.deepcopy(loss))
    own = groups(list(extended.parameters()))
    extensions = (
        computation.get_extensions() if hasattr(computation, "get_extensions") else [computation.get_extension()]
    )
    with backpack.backpack(*extensions, extension_hook=computation.get_extension_hook(own)):
        extended_loss(extended(inputs), targets).backward()
    return [computation.get_result(group) for group in own]


def everything(parameters: list[Tensor]) -> list[dict]:
    """One group, and its four leading directions."""
    return [{"params": parameters, "criterion": lambda values: [len(values) - 1 - k for k in range(4)]}]


def test_the_spectrum(problem):
    model, inputs, targets, likelihood, loss, factor = problem
    (theirs,) = run(vivit.EigvalshComputation(), model, inputs, targets, loss, everything)
    ours = factor * GGN(model, inputs, targets, likelihood).eigenvalues()
    theirs = theirs.flip(0)  # those of the softmax's null space too, which are zero
    assert_equal(ours, theirs[: len(ours)])
    assert float(theirs[len(ours) :].abs().sum()) < 1e-12


def test_the_leading_eigenvectors(problem):
    model, inputs, targets, likelihood, loss, factor = problem
    ((values, vectors),) = run(vivit.EighComputation(), model, inputs, targets, loss, everything)
    theirs = torch.cat([v.flatten(1) for v in vectors], 1).mT
    found, basis = GGN(model, inputs, targets, likelihood).eigenpairs(4)
    ours = dense_basis(basis)
    assert_equal(factor * found, values)
    assert_equal(ours * (ours * theirs).sum(0).sign(), theirs)


def test_the_leading_eigenvectors_of_every_layer(problem):
    """Groups of a weight and its bias are the blocks of the same kind."""
    model, inputs, targets, likelihood, loss, factor = problem

    def layers(parameters: list[Tensor]) -> list[dict]:
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        return [{"params": list(pair), "criterion": lambda e: [len(e) - 1, len(e) - 2]} for pair in pairs]

    theirs = run(vivit.EighComputation(), model, inputs, targets, loss, layers)
    found, basis = GGN(model, inputs, targets, likelihood, blocks="layer").eigenpairs(2)
    columns = dense_basis(basis).split(2, 1)
    assert_equal(factor * found, torch.cat([values for values, _ in theirs]))
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model if list(layer.parameters())]
    for index, (own, (_, vectors)) in enumerate(zip(columns, theirs, strict=True)):
        if likelihood == "regression" and index == len(sizes) - 1:
            continue  # every eigenvalue three times: no eigenvector is determined
        expected = torch.cat([v.flatten(1) for v in vectors], 1).mT
        rows = own.split(sizes)[index]
        assert_equal(rows * (rows * expected).sum(0).sign(), expected)


def test_slopes_and_curvatures_of_every_datum(problem):
    """Equations (7) and (8)."""
    model, inputs, targets, likelihood, loss, factor = problem
    ((slopes, curvatures),) = run(vivit.DirectionalDerivativesComputation(), model, inputs, targets, loss, everything)
    ggn = GGN(model, inputs, targets, likelihood)
    _, basis = ggn.eigenpairs(4)
    ours = ggn.directional_derivatives(basis)
    assert_equal(factor * ours.curvatures, curvatures)
    signs = (ours.slopes * slopes).sum(0).sign()  # of the eigenvectors, which are free
    assert_equal(factor * ours.slopes * signs, slopes)


def test_a_subset_of_the_data_for_the_curvature(problem):
    """Curvature sub-sampling, with the data that were drawn."""
    model, inputs, targets, likelihood, loss, factor = problem
    ggn = GGN(model, inputs, targets, likelihood, subsample=3, generator=5)
    chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(5))[:3].sort().values.tolist()
    computation = vivit.EigvalshComputation(subsampling=chosen)
    (theirs,) = run(computation, model, inputs, targets, loss, everything)
    ours = factor * ggn.eigenvalues()
    assert_equal(ours, theirs.flip(0)[: len(ours)])


def test_the_structure_has_the_same_directions(problem):
    """What a fit uses, and not only what the batch's spectrum is made of."""
    model, inputs, targets, likelihood, _, _ = problem
    ggn = GGN(model, inputs, targets, likelihood)
    _, basis = ggn.eigenpairs(3)
    other = LowRank(3).eigenbasis(ggn.network, ggn.statistics)
    assert_equal(dense_basis(other), dense_basis(basis), 0.0)
