"""Second moments and their eigenvectors: dense, of few columns, in blocks; each decomposed once, and checked."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import debiased_laplace as dl
from debiased_laplace.curvature import decomposition
from debiased_laplace.curvature.moments import (
    DiagonalMoment,
    MatrixMoment,
    MomentSum,
    OuterProducts,
    SecondMoment,
    eigenvectors,
    moment,
)
from debiased_laplace.curvature.structures import Kronecker, KroneckerStatistics
from tests.networks import ZOO
from tests.tolerances import EXACT, FLOAT32, assert_equal

SIZE, GROUPS = 160, 2


def columns(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(GROUPS, SIZE, n, generator=generator, dtype=torch.float64).to(dtype)


def several() -> dict[str, SecondMoment]:
    few, many = columns(5), columns(200, 1)
    return {
        "columns": OuterProducts((few[..., :2], few[..., 2:])),
        "scaled columns": OuterProducts((columns(7, 2),)) * 0.3,
        "matrix": MatrixMoment(many @ many.mT),
        "scaled matrix": MatrixMoment(many @ many.mT) * 0.7,
    }


@pytest.mark.parametrize("one, other", list(itertools.product(several(), repeat=2)))
def test_sums_multiples_and_diagonals_are_those_of_dense_matrices(one, other):
    first, second = several()[one], several()[other]
    assert_equal((first + second).dense(), first.dense() + second.dense(), EXACT)
    assert_equal((first * 0.25 + second * 2.0).dense(), 0.25 * first.dense() + 2.0 * second.dense(), EXACT)
    along = columns(3, 5)
    total = first + second
    assert_equal(total.along(along), (along * (total.dense() @ along)).sum(1), EXACT)
    part = slice(10, 60)
    assert_equal(total.block(part).dense(), total.dense()[:, part, part], EXACT)


def test_diagonals_add_up_and_are_summed_along_vectors():
    values, along = columns(1)[..., 0].square(), columns(3, 5)
    total = DiagonalMoment(values) * 0.5 + DiagonalMoment(values)
    assert_equal(total.dense(), 1.5 * values, EXACT)
    assert_equal(total.along(along), 1.5 * torch.einsum("gij,gi->gj", along.square(), values), EXACT)


def test_columns_are_kept_while_they_are_few():
    total = MomentSum(GROUPS, SIZE, square=True, like=torch.empty(0, dtype=torch.float64))
    expected, kinds = torch.zeros(GROUPS, SIZE, SIZE, dtype=torch.float64), []
    for step in range(12):
        piece = columns(10, step).permute(2, 0, 1).unflatten(0, (5, 2)).permute(0, 2, 3, 1)  # [N, G, P, S]
        total.add(piece, 0.5)
        expected += 0.5 * torch.einsum("ngps,ngqs->gpq", piece, piece)
        assert_equal(total.moment().dense(), expected, EXACT)
        kinds.append(type(total.moment()))
    assert kinds == [OuterProducts] * 8 + [MatrixMoment] * 4


def test_sums_of_columns_become_matrices_when_they_are_many():
    half = OuterProducts((columns(60),))
    assert type(half) is OuterProducts
    assert type(half + half) is MatrixMoment
    assert_equal((half + half).dense(), 2 * half.dense(), EXACT)


@pytest.mark.parametrize("name", several())
def test_eigenvectors_are_orthonormal_and_diagonalise(name):
    one = several()[name]
    (vectors,) = eigenvectors([one], ["a"], None, None)
    assert_equal(vectors.mT @ vectors, torch.eye(SIZE, dtype=torch.float64).expand_as(vectors), EXACT)
    rotated = vectors.mT @ one.dense() @ vectors
    values = rotated.diagonal(dim1=1, dim2=2)
    assert_equal(rotated, torch.diag_embed(values), EXACT)
    assert_equal(values, torch.linalg.eigvalsh(one.dense()).flip(-1), EXACT)


def test_columns_that_depend_on_each_other_have_orthonormal_eigenvectors():
    few = columns(3)
    one = OuterProducts((few, few, 1e-9 * columns(2, 1), torch.zeros(GROUPS, SIZE, 2, dtype=torch.float64)))
    (vectors,) = eigenvectors([one], ["a"], None, None)
    assert_equal(vectors.mT @ vectors, torch.eye(SIZE, dtype=torch.float64).expand_as(vectors), EXACT)
    values = one.along(vectors)
    assert_equal(values, torch.linalg.eigvalsh(one.dense()).flip(-1), EXACT)


@pytest.mark.parametrize("max_size", [160, 100, 64, 7])
@pytest.mark.parametrize("name", several())
def test_blocks_on_the_diagonal_of_a_large_matrix(name, max_size):
    one = several()[name]
    (vectors,) = eigenvectors([one], ["a"], None, max_size)
    assert_equal(vectors.mT @ vectors, torch.eye(SIZE, dtype=torch.float64).expand_as(vectors), EXACT)
    n_blocks = -(-SIZE // max_size)
    bounds = [SIZE * number // n_blocks for number in range(n_blocks + 1)]
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for start, stop in itertools.pairwise(bounds):
        assert stop - start <= max_size
        mask[start:stop, start:stop] = True
    assert not bool(vectors[:, ~mask].any())
    rotated = vectors.mT @ (one.dense() * mask) @ vectors
    assert_equal(rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)), EXACT)


def test_each_matrix_is_decomposed_once_and_small_ones_of_one_shape_together(monkeypatch):
    calls: list[torch.Size] = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(matrix.shape) or eigh(matrix))
    small = [MatrixMoment(columns(200, seed)[:, :9] @ columns(200, seed)[:, :9].mT) for seed in range(3)]
    large = OuterProducts((columns(5),))
    moments = [small[0], large, small[1] * 0.5, small[0], small[2], large * 3.0]
    first = eigenvectors(moments, list("abcdef"), None, None)
    assert sorted(calls) == [(GROUPS, 5, 5), (3 * GROUPS, 9, 9)]
    again = eigenvectors([moments[2], large], ["c", "b"], None, None)
    assert len(calls) == 2
    assert again[0] is first[2]
    assert again[1] is first[1] is first[5]
    for one, vectors in zip(moments, first, strict=True):
        assert_equal(one.along(vectors), torch.linalg.eigvalsh(one.dense()).flip(-1), EXACT)


def test_a_default_fit_decomposes_inputs_once(monkeypatch):
    """A is that of the whole stream, the same in all folds; B is another one in every round, and in the end."""
    calls: list[torch.Size] = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(matrix.shape) or eigh(matrix))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    x, y = torch.randn(200, 4), torch.randint(3, (200,))
    dl.fit(model, [(x, y)], "classification", sampler=dl.PrioritySampler(40), split=dl.CrossFit(4))
    assert sum(shape[0] for shape in calls if shape[-1] in (5, 7)) == 2
    assert sum(shape[0] for shape in calls if shape[-1] in (6, 3)) == 2 * 5


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.0, 8.0])
@pytest.mark.parametrize("size", [5, 64, 300])
def test_decompositions_of_lapack_in_single_precision_pass_the_check(size, spread):
    scales = torch.logspace(0, -spread, size)
    factors = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(0)) * scales[:, None]
    matrix = factors @ factors.mT
    values, vectors = torch.linalg.eigh(matrix)
    assert decomposition.is_accurate(matrix, values, vectors)


@pytest.mark.parametrize("size", [5, 64, 300])
@pytest.mark.parametrize("what", ["vector", "orthogonality", "value", "nan"])
def test_the_check_finds_what_is_wrong(size, what):
    factors = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(0))
    matrix = factors @ factors.mT
    values, vectors = torch.linalg.eigh(matrix)
    if what == "vector":
        vectors[:, -1] = torch.nn.functional.normalize(vectors[:, -1] + 3e-3 * vectors[:, 0], dim=0)
    elif what == "orthogonality":
        vectors = vectors * (1 + 1e-4)
    elif what == "value":
        values[-1] *= 1.01
    else:
        vectors[0, 0] = float("nan")
    assert not decomposition.is_accurate(matrix, values, vectors)


def test_what_fails_the_check_is_repaired_in_double_precision(monkeypatch, caplog):
    eigh, dtypes = torch.linalg.eigh, []

    def sloppy(matrix: Tensor) -> Any:
        dtypes.append(matrix.dtype)
        values, vectors = eigh(matrix)
        return (values, vectors * 1.001) if matrix.dtype == torch.float32 else (values, vectors)

    monkeypatch.setattr(torch.linalg, "eigh", sloppy)
    matrix = columns(200, dtype=torch.float32) @ columns(200, dtype=torch.float32).mT
    with caplog.at_level("INFO", logger="debiased_laplace.curvature.decomposition"):
        values, vectors = decomposition.eigh(matrix, "the first layer")
    assert dtypes == [torch.float32, torch.float64]
    assert "the curvature of 'the first layer' is repeated in double precision" in caplog.text
    assert vectors.dtype == torch.float32
    assert_equal(vectors.mT @ vectors, torch.eye(SIZE).expand_as(vectors), FLOAT32)
    assert_equal(values, torch.linalg.eigvalsh(matrix.double()).flip(-1).float(), FLOAT32)


def test_double_precision_is_not_repeated(monkeypatch):
    eigh, dtypes = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: dtypes.append(matrix.dtype) or eigh(matrix))
    decomposition.eigh(columns(200) @ columns(200).mT, "a")
    assert dtypes == [torch.float64]


# -- in a structure --------------------------------------------------------------------------------


def test_max_factor_makes_factors_block_diagonal():
    from debiased_laplace.network.network import Network

    case = ZOO["mlp"]
    network = Network.discover(case.model(), case.inputs(3))
    torch.manual_seed(0)
    statistics = KroneckerStatistics.of(
        [torch.randn(b.groups, b.inputs, 9, dtype=torch.float64) for b in network.blocks],
        [torch.randn(b.groups, b.outputs, 9, dtype=torch.float64) for b in network.blocks],
    )
    statistics = KroneckerStatistics(
        [moment(a.dense() @ a.dense().mT) for a in statistics.of_inputs],
        [moment(b.dense() @ b.dense().mT) for b in statistics.of_outputs],
    )
    whole = Kronecker().eigenbasis(network, statistics)
    some = Kronecker(max_factor=2).eigenbasis(network, statistics)
    for block, part, other in zip(network.blocks, some.parts, whole.parts, strict=True):
        for size, vectors, dense in (
            (block.inputs, part.inputs, other.inputs),
            (block.outputs, part.outputs, other.outputs),
        ):
            assert int(vectors.ne(0).sum(1).max()) <= 2
            assert bool(dense.ne(0).sum(1).max() > 2) == (size > 2)
    unlimited = Kronecker(max_factor=10_000).eigenbasis(network, statistics)
    for part, other in zip(unlimited.parts, whole.parts, strict=True):
        assert torch.equal(part.inputs, other.inputs)


@pytest.mark.parametrize("value", [0, -3, 1.5, True])
def test_max_factor_is_a_positive_whole_number(value):
    with pytest.raises(ValueError, match="Expected a whole number max_factor of at least 1, or None for no limit"):
        Kronecker(max_factor=value)
