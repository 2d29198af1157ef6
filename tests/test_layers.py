"""Layer rules own their blocks: embeddings without one-hot inputs, diagonal blocks, files of other versions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from curvlinops import GGNLinearOperator
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from debiased_laplace import DebiasedLaplace, Single, TwoBatch, UniformSampler
from debiased_laplace._checks import UnsupportedLayerError
from debiased_laplace._plain import from_plain, to_plain
from debiased_laplace.curvature import contractions
from debiased_laplace.curvature import indexed as indexed_gradients
from debiased_laplace.curvature.contractions import FactoredGradients
from debiased_laplace.curvature.indexed import IndexedGradients
from debiased_laplace.curvature.parts.identity import IdentityBasis
from debiased_laplace.curvature.parts.output import OutputBasis
from debiased_laplace.curvature.projected import projected_curvatures
from debiased_laplace.curvature.structures import Diagonal, Full, Isotropic, Kronecker, LowRank, Structure
from debiased_laplace.fitting.fit import Fit, fit
from debiased_laplace.likelihoods import Categorical, Gaussian
from debiased_laplace.network.discovery import unreached
from debiased_laplace.network.gradients import CurvatureData
from debiased_laplace.network.kinds import DENSE, DIAGONAL, Kind
from debiased_laplace.network.layers import RULES
from debiased_laplace.network.layers.convolution import ConvolutionCall
from debiased_laplace.network.network import Network
from debiased_laplace.network.selected import SelectedInputs, concatenated, second_moments
from debiased_laplace.posterior.gaussian import Posterior
from debiased_laplace.posterior.predictive import functional_moments, joint_covariance
from debiased_laplace.testing import (
    Problem,
    check_posterior,
    check_predictive,
    check_structure,
    dense_ggn,
    dense_posterior_precision,
)
from tests.datasets import example, measure, targets, weighted
from tests.networks import ZOO, Embedded
from tests.tolerances import EXACT, assert_equal

STRUCTURES: list[Structure] = [Kronecker(), LowRank(5), Diagonal(), Full(), Isotropic()]
NEW = [name for name in ZOO if name.startswith(("embedding", "transposed"))]


def problem(name: str) -> Problem:
    case = ZOO[name]
    data = weighted(case.inputs(6), targets(Categorical(), 6, case.n_outputs))
    return Problem(name, case.model(), data, Categorical())


@pytest.mark.parametrize("structure", [Kronecker(), Kronecker(diagonal=("*",)), Isotropic()], ids=repr)
def test_all_laws_hold(structure):
    """Of the structures that no other test runs on the whole zoo."""
    check_structure(structure, among=[problem(name) for name in NEW])


WRITTEN = [
    "product", "product-transposed", "product-in-groups", "product-and-bias", "heads", "class-token", "relative-bias",
    "standardised", "rows-of-a-weight", "functions-of-entries", "similarities", "branch",
]  # fmt: skip


@pytest.mark.parametrize("name", ["embedding-padding", "transposed-1d", "transposed-2d", "transposed-3d", *WRITTEN])
def test_the_ggn_is_that_of_curvlinops(name):
    case = ZOO[name]
    model, network, data = example(case, Categorical(), n=6, uniform=True)
    full = measure(Full(), network, data, Categorical())
    basis = Full().eigenbasis(network, full)
    operator = GGNLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(data.inputs, data.targets)], num_data=6
    )
    ggn = operator @ torch.eye(network.n_params, dtype=torch.float64)
    rows = basis.lift(torch.eye(basis.rank, dtype=torch.float64))
    assert_equal(full.curvatures(basis), (rows @ ggn @ rows.T).diagonal())


# -- a layer is what it computes, and not how it is written ------------------------------------------


NOTATIONS = {
    "x @ W": lambda x, w, b: x @ w,
    "linear": lambda x, w, b: F.linear(x, w.t()),
    "matmul of the transposed": lambda x, w, b: torch.matmul(w.t(), x.mT).mT,
    "einsum": lambda x, w, b: torch.einsum("...i,io->...o", x, w),
    "tensordot": lambda x, w, b: torch.tensordot(x, w, dims=([2], [0])),
    "inner": lambda x, w, b: torch.inner(x, w.T),
    "convolution": lambda x, w, b: F.conv1d(x.mT, w.t()[..., None]).mT,
    "in a batch": lambda x, w, b: torch.matmul(x[:, None], w)[:, 0],
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w).unflatten(0, x.shape[:2]),
    "linear with a bias": lambda x, w, b: F.linear(x, w.t(), b),
    "convolution with a bias": lambda x, w, b: F.conv1d(x.mT, w.t()[..., None], b).mT,
}  # fmt: skip


class Notation(nn.Module):
    """One layer in one of the notations, between two others."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.first, self.head = name, nn.Linear(3, 5), nn.Linear(4, 2)
        self.w = nn.Parameter(torch.randn(5, 4))
        if name in ("addmm", "linear with a bias", "convolution with a bias"):
            self.b = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = NOTATIONS[self.name](self.first(x).tanh(), self.w, getattr(self, "b", None))
        return self.head(hidden.tanh()).sum(1)


def variances_of(name: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, y, at = torch.randn(12, 4, 3).double(), torch.randint(2, (12,)), torch.randn(3, 4, 3).double()
    torch.manual_seed(1)
    model = Notation(name).double()
    fitted = fit(model, [(x, y)], Categorical(), sampler=UniformSampler(8), split=TwoBatch())
    assert all(block.kind.name == "kronecker" for block in fitted.network.blocks)
    return fitted.posterior.curvatures.sort().values, functional_moments(fitted.network, fitted.posterior, at)[1]


@pytest.mark.parametrize("name", NOTATIONS)
def test_a_layer_has_the_same_factors_in_every_notation(name):
    expected = variances_of("linear with a bias" if name == "addmm" or "bias" in name else "linear")
    for value, of_linear in zip(variances_of(name), expected, strict=True):
        assert_equal(value, of_linear)


# -- an embedding is a linear layer on one-hot inputs ----------------------------------------------


class OneHot(nn.Module):
    """The same network with a linear layer in the place of the embedding."""

    def __init__(self, embedded: Embedded) -> None:
        super().__init__()
        table = embedded.embedding.weight
        self.embedding = nn.Linear(*table.shape, bias=False).double()
        self.embedding.weight.data = table.detach().T.clone()
        self.head = embedded.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)).reshape(len(x), -1, 3).mean(1))


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
@pytest.mark.parametrize("estimator", ["projected", "factored"])
@pytest.mark.parametrize("split", [Single(), TwoBatch()], ids=repr)
def test_an_embedding_is_a_linear_layer_on_one_hot_inputs(structure, estimator, split):
    model, tokens = Embedded().double().eval(), torch.randint(5, (20, 4), generator=torch.Generator().manual_seed(0))
    labels, new = targets(Categorical(), 20, 2), torch.randint(5, (6, 4), generator=torch.Generator().manual_seed(1))
    results = []
    for network, inputs, others in (
        (model, tokens, new), (OneHot(model), F.one_hot(tokens, 5).double(), F.one_hot(new, 5).double()),
    ):  # fmt: skip
        fitted = fit(
            network, [(inputs, labels)], Categorical(), structure=structure, split=split, estimator=estimator,
            sampler=UniformSampler(16), generator=3,
        )  # fmt: skip
        posterior = fitted.posterior
        moments = functional_moments(fitted.network, posterior, others)
        joint = joint_covariance(fitted.network, posterior, others)
        evidence = posterior.log_marginal_likelihood(0.0)
        results.append([
            *moments, *joint, posterior.log_det_precision, posterior.square_norm(posterior.mean + 0.1), evidence,
            posterior.curvatures.sort().values,
        ])  # fmt: skip
    for sparse, dense in zip(*results, strict=True):
        assert_equal(sparse, dense, 1e-10)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor has while it is on."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in _pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() * leaf.element_size():
                self.numbers = max(self.numbers, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


class Classifier(nn.Module):
    """A large vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)).mean(1))


@pytest.mark.parametrize("structure", [Kronecker(), LowRank(2), Diagonal()], ids=repr)
def test_nothing_is_as_large_as_the_vocabulary_times_itself_or_the_data(structure):
    """Three copies of the table are the most: the gradients of the three data that the layers are found with."""
    vocabulary, n, length = 30_000, 24, 12
    torch.manual_seed(0)
    model, tokens = Classifier(vocabulary), torch.randint(vocabulary, (n, length))
    with Largest() as largest:
        fitted = fit(model, [(tokens, torch.arange(n) % 3)], Categorical(), structure=structure, chunk_size=n)
        _, covariance = functional_moments(fitted.network, fitted.posterior, tokens[:8], chunk_size=8)
        fitted.posterior.sample(1)
    assert largest.numbers <= 3 * (16 * vocabulary + 51)
    assert largest.numbers < vocabulary**2 / 100
    assert largest.numbers < n * vocabulary * length / 4
    assert bool((covariance.diagonal(dim1=1, dim2=2) > 0).all())


def selected(n: int, length: int, size: int, seed: int = 0) -> SelectedInputs:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(size, (n, length), generator=generator)
    values = torch.randn(n, length, generator=generator, dtype=torch.float64)
    return SelectedInputs(index, values, size)


def test_selected_inputs_are_the_dense_ones_without_zeros():
    inputs, other = selected(4, 6, 5), selected(4, 2, 5, seed=1)
    dense, weights = inputs.to_dense(), torch.rand(4, dtype=torch.float64)
    assert inputs.shape == dense.shape
    assert torch.equal(inputs[1:3].to_dense(), dense[1:3])
    assert torch.equal(concatenated([inputs, other]).to_dense(), torch.cat([dense, other.to_dense()], -1))
    assert_equal(second_moments(inputs), second_moments(dense))
    assert_equal(second_moments(inputs, weights), torch.einsum("n,ngis->gi", weights, dense.square()))
    assert_equal(second_moments(dense, weights), torch.einsum("n,ngis->gi", weights, dense.square()))
    index, columns = inputs.distinct()
    assert index.shape[1] == max(len(row.unique()) for row in inputs.index)
    assert_equal(torch.zeros(4, 5, 6).double().scatter_add_(1, index[..., None].expand_as(columns), columns)[:, None],
                 dense)  # fmt: skip


@pytest.mark.parametrize("memory", [1, 500, 2**24])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("frequent", [0, 1, 2, 8])
def test_indexed_gradients_are_the_formed_ones(memory, shared, frequent, monkeypatch):
    monkeypatch.setattr(indexed_gradients, "FREQUENT", frequent)
    monkeypatch.setattr(contractions, "PROJECTION_MEMORY", {"cpu": memory, "accelerator": memory})
    inputs = selected(5, 1 if shared else 6, 7)
    generator = torch.Generator().manual_seed(2)

    def normals(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    vectors = normals(1, 1, 3, 4, 1) if shared else normals(5, 1, 3, 4, 6)
    indexed, dense = IndexedGradients.of(inputs, vectors), FactoredGradients(inputs.to_dense(), vectors)
    scales, columns, coefficients = normals(2, 1, 4, 7).square(), normals(3, 1, 4, 7), normals(2, 5, 3)
    mask = normals(1, 4, 7) > 0
    assert (len(indexed), indexed.n_vectors, indexed.shape) == (len(dense), dense.n_vectors, dense.shape)
    for name, arguments in {
        "rows": (), "second_moment": (), "covariances": (scales,), "variances": (scales,), "project": (columns,),
        "combine": (coefficients,),
    }.items():  # fmt: skip
        assert_equal(getattr(indexed, name)(*arguments), getattr(dense, name)(*arguments))
    assert_equal(indexed.scaled(0.3).rows(), 0.3 * dense.rows())
    assert_equal(indexed.masked(mask).rows(), dense.masked(mask).rows())
    parts = [
        IndexedGradients.of(inputs[part], vectors if shared else vectors[part]) for part in (slice(2), slice(2, 5))
    ]
    assert_equal(IndexedGradients.gram(parts), dense.rows().flatten(0, 1) @ dense.rows().flatten(0, 1).T)


def test_prior_precisions_may_differ_between_tokens_and_not_within_one():
    _, network, data = example(ZOO["embedding"], Categorical(), n=6)
    statistics = measure(Kronecker(), network, data, Categorical())
    basis = Kronecker().eigenbasis(network, statistics)
    assert isinstance(basis.parts[0], OutputBasis)
    curvatures = projected_curvatures(network, basis, CurvatureData(network, data, Categorical()))
    of_tokens = torch.linspace(0.5, 2, 5, dtype=torch.float64)[:, None].expand(5, 3)
    prior = torch.cat([of_tokens.flatten(), torch.full((8,), 0.7, dtype=torch.float64)])
    posterior = Posterior(network.mean(), basis, curvatures, 30, prior)
    check_posterior(posterior)
    check_predictive(network, posterior, data.inputs)
    prior[0] = 3.0
    with pytest.raises(ValueError, match=r"prior precision for all of \['embedding.weight'\]"):
        _ = replace(posterior, prior_precision=prior).precisions
    with pytest.raises(ValueError, match="for each of its rows, got several for one row"):
        basis.check_priors(prior)


def test_the_coverage_says_that_an_embedding_has_a_diagonal_factor():
    la = DebiasedLaplace(ZOO["embedding"].model(), "classification", "all", "kron")
    la.fit([(ZOO["embedding"].inputs(8), targets(Categorical(), 8, 2))])
    _, first, second, *_ = la.coverage().splitlines()
    assert first.split() == ["embedding.weight", "embedding.weight", "kronecker", "15", "5", "(diagonal)", "x", "3"]
    assert second.split() == ["head", "head.weight,", "head.bias", "kronecker", "8", "4", "x", "2"]


def test_the_evidence_has_its_derivatives_in_the_prior_precisions():
    """That of the log-determinant is the diagonal of the dense covariance; one for each tensor that directions mix."""
    _, network, data = example(ZOO["embedding"], Categorical(), n=6)
    basis = Kronecker().eigenbasis(network, measure(Kronecker(), network, data, Categorical()))
    curvatures = projected_curvatures(network, basis, CurvatureData(network, data, Categorical()))
    of_tokens = torch.linspace(0.5, 2, 5, dtype=torch.float64)[:, None].expand(5, 3)
    prior = torch.cat([of_tokens.flatten(), torch.full((8,), 0.7, dtype=torch.float64)]).requires_grad_()
    posterior = Posterior(network.mean(), basis, curvatures, 30, prior)
    (derivative,) = torch.autograd.grad(posterior.log_det_precision, prior)
    expected = dense_posterior_precision(posterior).inverse().diagonal()
    assert_equal(derivative[:15], expected[:15])
    for tensor in (slice(15, 21), slice(21, 23)):
        assert_equal(derivative[tensor].sum(), expected[tensor].sum())


def test_an_embedding_that_is_no_function_of_its_weights_is_an_error():
    for model in (
        nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Flatten(), nn.Linear(6, 2)),
        nn.Sequential(nn.EmbeddingBag(5, 3, max_norm=1.0), nn.Linear(3, 2)),
    ):
        before = model[0].weight.clone()
        with pytest.raises(UnsupportedLayerError, match=r"without max_norm, got one of 5 x 3 .*Rescale them once"):
            Network.discover(model, torch.randint(5, (4, 2)))
        assert torch.equal(model[0].weight, before)


# -- diagonal blocks -------------------------------------------------------------------------------


def test_a_block_that_is_declared_diagonal_has_the_exact_diagonal():
    """In a fit with all data, beside Kronecker blocks; equation (2) is then the diagonal of the GGN."""
    model, network, data = example(ZOO["embedding"], Gaussian(), n=8, uniform=True)
    structure = Kronecker(diagonal=["embedding"])
    fitted = fit(model, [(data.inputs, data.targets)], Gaussian(), structure=structure, sampler=UniformSampler(None))
    basis = fitted.posterior.basis
    assert isinstance(basis.parts[0], IdentityBasis)
    ggn = dense_ggn(model, data.inputs, data.weights, Gaussian())
    diagonal = network.blocks[0].scatter(basis.split(fitted.posterior.curvatures)[0])["embedding.weight"]
    assert_equal(diagonal.flatten(), ggn.diagonal()[:15])
    check_posterior(fitted.posterior)
    check_predictive(fitted.network, fitted.posterior, data.inputs[:3])
    described = [part.describe([block]) for part, block in zip(basis.parts, network.blocks, strict=True)]
    assert described == [("diagonal", ""), ("kronecker", "4 x 2")]


def test_factored_curvatures_of_a_diagonal_block_are_products_of_diagonals():
    _, network, data = example(ZOO["conv1d"], Categorical())
    kronecker, diagonal = Kronecker(), Kronecker(diagonal=["*"])
    full, statistics = (measure(s, network, data, Categorical()) for s in (kronecker, diagonal))
    values = statistics.curvatures(diagonal.eigenbasis(network, statistics))
    expected = [
        (b.diagonal(dim1=1, dim2=2)[:, :, None] * a.diagonal(dim1=1, dim2=2)[:, None, :]).flatten()
        for a, b in zip(full.inputs, full.outputs, strict=True)
    ]
    assert_equal(values, torch.cat(expected))


@pytest.mark.parametrize(
    ("diagonal", "match"),
    [(["nothing"], "matches none of"), (["head.weight"], r"in diagonal=\['head.weight'\] together, got some")],
)
def test_what_cannot_be_declared_diagonal_is_named(diagonal, match):
    case = ZOO["embedding"]
    with pytest.raises(ValueError, match=match):
        fit(case.model(), [(case.inputs(8), torch.zeros(8, dtype=torch.long))], Categorical(),
            structure=Kronecker(diagonal=diagonal))  # fmt: skip


@dataclass
class DiagonalConvolution(ConvolutionCall):
    """A layer whose rule wants a diagonal."""

    kind: ClassVar[Kind] = DIAGONAL


def test_a_rule_says_what_curvature_its_block_gets(monkeypatch):
    rule = RULES[torch.conv1d]
    monkeypatch.setitem(
        RULES, torch.conv1d, lambda *a, **k: [replace(one, call=DiagonalConvolution) for one in rule(*a, **k)]
    )
    check_structure(Kronecker(), among=[problem("conv1d")])
    network = Network.discover(ZOO["conv1d"].model(), ZOO["conv1d"].inputs(4))
    assert [block.kind.name for block in network.blocks] == ["diagonal", "kronecker"]


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embedding", "transposed-1d"])
@pytest.mark.parametrize("structure", [Kronecker(), LowRank(3)], ids=repr)
def test_a_fit_survives_in_a_file(name, structure, tmp_path):
    case = ZOO[name]
    data, model = problem(name).data, case.model()
    fitted = fit(model, [(data.inputs, data.targets)], Categorical(), structure=structure)
    fitted.save(tmp_path / "fit.safetensors")
    loaded = Fit.load(tmp_path / "fit.safetensors", model)
    assert loaded.network.blocks == fitted.network.blocks
    moments = [functional_moments(f.network, f.posterior, case.inputs(3, seed=4)) for f in (fitted, loaded)]
    for before, after in zip(*moments, strict=True):
        assert_equal(after, before, 0.0)


@pytest.mark.parametrize("name", ["embedding", "transposed-1d"])
def test_a_network_from_before_a_rule_is_as_it_was(name, monkeypatch):
    """Its blocks are those of parameters without a rule, with kinds that were strings, and no call is recorded now."""
    case = ZOO[name]
    model, inputs = case.model(), case.inputs(4)
    with monkeypatch.context() as earlier:
        for function in (F.embedding, torch.embedding, torch.conv_transpose1d):
            earlier.delitem(RULES, function)
        network = Network.discover(model, inputs)
        _, data = problem(name).model, problem(name).data
        expected = measure(Full(), network, data, Categorical()).matrices[0]
    assert network.blocks[0].kind == DENSE
    description = network.description()
    del description["call_types"]
    for block in description["blocks"]:
        block["kind"] = block["kind"].name
        del block["arrangement"]
    restored = Network.restore(model, description)
    assert restored.blocks == network.blocks
    assert_equal(measure(Full(), restored, data, Categorical()).matrices[0], expected, EXACT)


@pytest.mark.parametrize("module", ["contractions", "curvature.contractions"])
def test_the_progress_of_a_low_rank_fit_of_an_earlier_version_is_read(module):
    gradients = FactoredGradients(torch.ones(2, 1, 3, 1), torch.ones(2, 1, 2, 4, 1))
    plain = to_plain(gradients)
    read = from_plain(plain | {"__class__": f"debiased_laplace.{module}:Gradients"})
    assert isinstance(read, FactoredGradients)
    assert torch.equal(read.rows(), gradients.rows())
    for home in ("basis", "curvature.basis"):
        part = from_plain(to_plain(IdentityBasis(1, 2, 3)) | {"__class__": f"debiased_laplace.{home}:IdentityBasis"})
        assert part == IdentityBasis(1, 2, 3)


class Attends(nn.Module):
    """Attention by the module, in training the same as torch's own, and by the function."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 300)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(F.scaled_dot_product_attention(x, x, x).mean(1))


def test_what_has_no_variance_is_found_without_a_backward_pass_for_every_output(monkeypatch):
    """Fused attention has no second derivative, which tells of all outputs at once."""
    torch.manual_seed(0)
    inputs, passes = torch.randn(3, 5, 4), []
    network, backward = Network.discover(Attends().eval(), inputs), torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(1) or backward(*a, **k))
    assert unreached(network, inputs) == ([], [], [])
    assert len(passes) == 2
