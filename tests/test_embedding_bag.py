"""Bags of tokens: sums, means and maxima of rows of a table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import debiased_laplace as dl
from debiased_laplace import _data
from debiased_laplace.likelihoods import Gaussian
from debiased_laplace.network.network import Network
from debiased_laplace.network.tracing import WrittenOut
from debiased_laplace.sampling.sample import WeightedData
from debiased_laplace.testing import check_posterior, check_predictive, dense_basis, dense_ggn, dense_jacobian
from tests.datasets import measure
from tests.networks import Bags
from tests.test_gradients import reconstructed
from tests.test_recurrent import made, numbers
from tests.tolerances import EXACT, assert_equal

TOKENS = torch.tensor([[1, 2, 2, 4], [0, 3, 0, 2], [2, 2, 2, 2], [0, 0, 0, 0], [4, 0, 4, 1]])


class Flat(Bags):
    """Tokens up to the first zero in one tensor with offsets, or as several bags for a datum, or with weights."""

    def __init__(self, how: str, mode: str, **options) -> None:
        super().__init__(mode, **options)
        self.how, self.weights = how, nn.Embedding(5, 1)
        self.weights.requires_grad_(how == "weighted")

    def forward(self, x):
        if self.how == "bags":
            return self.head(torch.tanh(self.bag(x.reshape(-1, 2))).unflatten(0, (len(x), -1)).sum(1))
        if self.how == "weighted":
            return self.head(torch.tanh(self.bag(x, per_sample_weights=self.weights(x)[..., 0])))
        lengths = (x != 0).cumprod(1).sum(1)
        tokens = x[torch.arange(x.shape[1]) < lengths[:, None]]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return self.head(torch.tanh(self.bag(tokens, offsets if self.bag.include_last_offset else offsets[:-1])))


CASES = {
    **{f"{how}-{mode}-{'-'.join(options)}": (how, mode, options)
       for how in ("bags", "offsets") for mode in ("sum", "mean", "max")
       for options in ({}, {"padding_idx": 2}, {"padding_idx": -1})},
    "weighted": ("weighted", "sum", {"padding_idx": 1}),
    "last-offset": ("offsets", "mean", {"include_last_offset": True}),
    "sparse": ("offsets", "sum", {"sparse": True}),
    "scaled-by-frequency": ("offsets", "mean", {"scale_grad_by_freq": True}),
}  # fmt: skip


def reference(model):
    """The same model with gradients that are dense derivatives."""
    model.bag.sparse = model.bag.scale_grad_by_freq = False
    return model


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_every_datum(name):
    how, mode, options = CASES[name]
    model = made(lambda: Flat(how, mode, **options))
    expected = model(TOKENS)
    with WrittenOut():
        assert_equal(model(TOKENS), expected, 1e-12)
    network = Network.discover(model, TOKENS)
    for inputs in (TOKENS, TOKENS[3:], TOKENS[:1]):
        vectors = numbers(2, len(inputs), 2)
        jacobian = dense_jacobian(reference(made(lambda: Flat(how, mode, **options))), inputs)
        expected = torch.einsum("vnc,ncd->vnd", vectors, jacobian)
        assert_equal(reconstructed(network, inputs, vectors), expected, EXACT)
    assert {block.kind.name for block in network.blocks} == {"kronecker"}


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_functional_calls_are_those_of_torch(mode):
    """A padding index from the end, weights of flat tokens, bags without tokens, and jagged tensors."""
    table, tokens, offsets = numbers(5, 3), TOKENS.flatten(), torch.tensor([0, 4, 4, 11, 20])
    jagged = torch.nested.nested_tensor([TOKENS[0], TOKENS[1, :2]], layout=torch.jagged)
    arguments = [
        ((TOKENS, table), {"padding_idx": -1}), ((tokens, table, offsets), {}), ((jagged, table), {}),
        ((tokens, table, offsets[:1]), {}),
    ]  # fmt: skip
    if mode == "sum":
        arguments.append(((tokens, table, offsets), {"per_sample_weights": numbers(20, seed=1)}))
    for positional, named in arguments:
        expected = F.embedding_bag(*positional, mode=mode, **named)
        with WrittenOut():
            assert_equal(F.embedding_bag(*positional, mode=mode, **named), expected, 1e-12)


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}])
def test_gradients_of_an_embedding_are_derivatives_whatever_it_makes_of_them(options):
    build = lambda **options: nn.Sequential(nn.Embedding(5, 3, **options), nn.Flatten(), nn.Linear(12, 2))  # noqa: E731
    model = made(lambda: build(**options))
    vectors = numbers(2, len(TOKENS), 2)
    expected = torch.einsum("vnc,ncd->vnd", vectors, dense_jacobian(made(build), TOKENS))
    assert_equal(reconstructed(Network.discover(model, TOKENS), TOKENS, vectors), expected, EXACT)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_one_datum_has_its_ggn_on_the_diagonal(mode):
    """In the factored estimate, too: a token that comes twice counts as one input of two, not as two of one."""
    model, inputs = made(lambda: Bags(mode)), TOKENS[:1]
    network = Network.discover(model, TOKENS)
    data = WeightedData(inputs, numbers(1, 2), torch.ones(1, dtype=torch.float64), torch.arange(1))
    statistics = measure(dl.Kronecker(), network, data, Gaussian())
    basis = dl.Kronecker().eigenbasis(network, statistics)
    dense = dense_ggn(model, inputs, data.weights, Gaussian())
    columns = dense_basis(basis)
    assert_equal(statistics.curvatures(basis), (columns * (dense @ columns)).sum(0))


def test_fit_predict_save_and_load(tmp_path):
    model = made(lambda: Flat("offsets", "mean", sparse=True))
    la = dl.fit(model, [(TOKENS, numbers(5, 2))], Gaussian())
    check_posterior(la.posterior)
    check_predictive(la.network, la.posterior, TOKENS[:3])
    assert la.predict(TOKENS, method="linearized").mean.isfinite().all()
    la.save(tmp_path / "posterior")
    loaded = dl.load(tmp_path / "posterior", model)
    assert_equal(loaded.predict(TOKENS).variance, la.predict(TOKENS).variance)
    assert model.bag.sparse
    assert "bag.weight" in str(la.coverage())


def test_flat_tokens_with_offsets_from_the_loader_are_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"first dimension, got shapes .*\[N, T\] and give their lengths"):
        _data.count((torch.zeros(9, dtype=torch.long), torch.tensor([0, 4, 7])))
