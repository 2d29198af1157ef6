"""Contractions of gradient factors against gradients that a loop forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from debiased_laplace.curvature import contractions
from debiased_laplace.curvature.contractions import FactoredGradients, rotate
from debiased_laplace.curvature.pairs import PairsOfPositions
from tests.tolerances import EXACT, FLOAT32, assert_equal

#: N, G, V, O, I, S: one position, few and many positions, few and many vectors, wide and narrow.
SHAPES = {
    "one-position": (5, 1, 3, 4, 6, 1),
    "groups": (4, 3, 2, 2, 5, 1),
    "exact-block": (4, 1, 3, 7, 1, 1),
    "positions": (5, 1, 3, 4, 6, 7),
    "positions-groups": (4, 3, 2, 2, 5, 4),
    "many-positions": (3, 1, 2, 3, 2, 40),
    "one-vector": (5, 2, 1, 3, 4, 3),
    "one-datum": (1, 2, 3, 3, 4, 3),
    "one-of-everything": (1, 1, 1, 1, 1, 1),
}


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(name: str, shared: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs ``[N, G, I, S]`` and vectors ``[N, G, V, O, S]``."""
    n, groups, n_vectors, height, width, positions = SHAPES[name]
    vectors = normals(1 if shared else n, groups, n_vectors, height, positions, seed=1)
    return normals(n, groups, width, positions), vectors


def formed(inputs: Tensor, vectors: Tensor) -> Tensor:
    """``J: [N, V, G, O, I]``, one outer product after the other."""
    n, groups, width, positions = inputs.shape
    _, _, n_vectors, height, _ = vectors.shape
    gradients = torch.zeros(n, n_vectors, groups, height, width, dtype=inputs.dtype)
    for i in range(n):
        for v in range(n_vectors):
            for group in range(groups):
                for s in range(positions):
                    g = vectors[i if len(vectors) > 1 else 0, group, v, :, s]
                    gradients[i, v, group] += torch.outer(g, inputs[i, group, :, s])
    return gradients


@pytest.fixture(params=["roomy", "one-by-one", "a-few"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything at once; the smallest pieces there are; several data or outputs at a time."""
    amount = {"roomy": 2**24, "one-by-one": 1, "a-few": 700}[request.param]
    monkeypatch.setattr(contractions, "PROJECTION_MEMORY", {"cpu": amount, "accelerator": amount})
    return request.param


@pytest.fixture(params=["by-cost", "inputs-first", "formed-first"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The cheaper order of a contraction, and either of them whatever it costs."""
    if request.param != "by-cost":
        first = request.param == "inputs-first"
        monkeypatch.setattr(FactoredGradients, "_inputs_first", lambda self, k: first or self._factored)
    return request.param


@pytest.fixture(params=["by-pairs", "formed"])
def positions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either way with several positions, whatever it costs."""
    for name in ("give_second_moment", "give_covariances"):
        monkeypatch.setattr(PairsOfPositions, name, lambda *_, **__: request.param == "by-pairs")
    return request.param


CASES = [(name, False) for name in SHAPES] + [(name, True) for name in ("one-position", "groups", "exact-block")]
every = pytest.mark.parametrize(("name", "shared"), CASES, ids=[n + "-shared" * s for n, s in CASES])


@every
def test_rows_are_the_gradients(name, shared, memory):
    inputs, vectors = factors(name, shared)
    gradients = FactoredGradients(inputs, vectors)
    _, groups, _, height, width, _ = SHAPES[name]
    assert gradients.shape == (groups, height, width)
    assert_equal(gradients.rows(), formed(inputs, vectors).flatten(2))


@every
def test_second_moment(name, shared, memory, positions):
    inputs, vectors = factors(name, shared)
    expected = formed(inputs, vectors).square().sum((0, 1))
    assert_equal(FactoredGradients(inputs, vectors).second_moment(), expected)


@every
@pytest.mark.parametrize("kind", ["any", "one-for-all"])
@pytest.mark.parametrize("grid", [1, 3])
def test_covariances_and_variances_under_a_grid_of_scales(name, shared, grid, kind, memory, positions):
    inputs, vectors = factors(name, shared)
    expected = formed(inputs, vectors)
    scales = normals(grid, *expected.shape[2:], seed=2).square()
    scales.flatten()[0] = 0.0  # a direction that does not count
    if kind == "one-for-all":  # of a prior alone
        scales = scales[..., -1:, -1:, -1:].expand(-1, *expected.shape[2:])
    covariances = torch.einsum("nvgoi,rgoi,nwgoi->rnvw", expected, scales, expected)
    assert_equal(FactoredGradients(inputs, vectors).covariances(scales), covariances)
    assert_equal(FactoredGradients(inputs, vectors).variances(scales), covariances.diagonal(dim1=2, dim2=3))


def test_a_grid_of_priors_alone_is_one_contraction(monkeypatch):
    """Numbers that are each for all entries are not contracted one by one, nor by pairs of vectors."""
    monkeypatch.setattr(PairsOfPositions, "give_covariances", lambda _, n_scales, **__: n_scales > 1)
    monkeypatch.setattr(contractions, "many_scales", lambda n_scales, _: n_scales > 1)
    for way in (PairsOfPositions, contractions):
        monkeypatch.setattr(way, "covariances" if way is PairsOfPositions else "covariances_of_rows", pytest.fail)
    inputs, vectors = factors("positions")
    priors = torch.linspace(0.1, 2, 50, dtype=torch.float64)
    expected = torch.einsum("r,nvgoi,nwgoi->rnvw", priors, *2 * [formed(inputs, vectors)])
    grid = priors[:, None, None, None].expand(-1, *formed(inputs, vectors).shape[2:])
    assert_equal(FactoredGradients(inputs, vectors).covariances(grid), expected)


def test_variances_take_scales_of_any_sign(positions):
    """They are differences of two in the complement of an incomplete basis."""
    for name in ("one-position", "positions", "positions-groups"):
        inputs, vectors = factors(name)
        gradients = formed(inputs, vectors)
        scales = normals(2, *gradients.shape[2:], seed=2)
        expected = torch.einsum("nvgoi,rgoi->rnv", gradients.square(), scales)
        assert_equal(FactoredGradients(inputs, vectors).variances(scales), expected)


@pytest.mark.parametrize(
    ("n_vectors", "positions", "height", "width", "by_pairs"),
    [
        (1000, 4, 8, 90, True),
        (100, 36, 192, 1729, True),
        (100, 256, 192, 1729, False),  # as many pairs as products of formed gradients
        (10, 400, 8, 90, False),
        (10, 4, 24, 25, False),  # so small that what operations cost to be called decides
    ],
)
def test_the_cheaper_way_with_several_positions(n_vectors, positions, height, width, by_pairs):
    """Few positions and many vectors by pairs; many positions or few vectors with formed gradients."""
    inputs = torch.empty(2, 1, width, positions, device="meta")
    pairs = PairsOfPositions(inputs, torch.empty(2, 1, n_vectors, height, positions, device="meta"), 2**24)
    assert pairs.give_second_moment() is by_pairs
    for diagonal in (False, True):
        assert pairs.give_covariances(1, diagonal=diagonal) is by_pairs


def test_many_posteriors_share_products_of_formed_gradients():
    """A grid of a tuning, over a small convolution: pairs of positions would be weighted anew for each posterior."""
    inputs, vectors = torch.empty(64, 1, 145, 16, device="meta"), torch.empty(64, 1, 10, 32, 16, device="meta")
    assert not PairsOfPositions(inputs, vectors, 2**24).give_covariances(100)
    inputs, vectors = torch.empty(64, 1, 1729, 4, device="meta"), torch.empty(64, 1, 100, 192, 4, device="meta")
    assert PairsOfPositions(inputs, vectors, 2**24).give_covariances(100)


@every
@pytest.mark.parametrize("k", [1, 4, 30])
def test_projecting_on_matrices(name, shared, k, memory, order):
    inputs, vectors = factors(name, shared)
    gradients = formed(inputs, vectors)
    columns = normals(k, *gradients.shape[2:], seed=3)
    expected = torch.einsum("nvgoi,kgoi->nvk", gradients, columns)
    assert_equal(FactoredGradients(inputs, vectors).project(columns), expected)
    assert_equal(FactoredGradients(inputs, vectors).project(columns.flatten(1)), expected)


@every
@pytest.mark.parametrize("k", [1, 4, 30])
def test_combining_gradients(name, shared, k, memory, order):
    inputs, vectors = factors(name, shared)
    gradients = formed(inputs, vectors)
    coefficients = normals(k, *gradients.shape[:2], seed=4)
    expected = torch.einsum("knv,nvgoi->kgoi", coefficients, gradients)
    assert_equal(FactoredGradients(inputs, vectors).combine(coefficients), expected)


@every
@pytest.mark.parametrize("cuts", [[], [1], [2, 3]])
def test_inner_products_of_all_with_all(name, shared, cuts, memory):
    """Chunks of unequal sizes are one after the other."""
    inputs, vectors = factors(name, shared)
    cuts = [cut for cut in cuts if cut < len(inputs)]
    chunks = inputs.tensor_split(cuts)
    own = [vectors] * len(chunks) if shared else vectors.tensor_split(cuts)
    rows = formed(inputs, vectors).flatten(0, 1).flatten(1)
    parts = [FactoredGradients(a, g) for a, g in zip(chunks, own, strict=True)]
    assert_equal(FactoredGradients.gram(parts), rows @ rows.mT)
    assert_equal(FactoredGradients.gram([part.compact() for part in parts]), rows @ rows.mT)


@pytest.mark.parametrize(
    ("k", "shape", "first"),
    [
        (2, (4, 1, 8, 5, 6, 3), True),  # k S (V + I) = 84 below V I (S + k) = 240
        (2, (4, 1, 1, 5, 1, 40), False),  # 560 above 252
        (4, (4, 1, 3, 5, 3, 4), False),  # 96 above 72
        (50, (4, 1, 2, 5, 2, 30), False),  # 6,000 above 320
        (10**6, (4, 1, 2, 5, 2, 1), True),  # one position is never formed
    ],
)
def test_the_cheaper_order_is_taken(k, shape, first):
    n, groups, n_vectors, height, width, positions = shape
    gradients = FactoredGradients(
        normals(n, groups, width, positions), normals(n, groups, n_vectors, height, positions)
    )
    assert gradients._inputs_first(k) is first


@every
def test_the_compact_form_is_the_same(name, shared, memory):
    inputs, vectors = factors(name, shared)
    gradients = formed(inputs, vectors)
    compact = FactoredGradients(inputs, vectors).compact()
    columns, coefficients = normals(4, *gradients.shape[2:], seed=3), normals(4, *gradients.shape[:2], seed=4)
    assert_equal(compact.rows(), gradients.flatten(2))
    assert_equal(compact.project(columns), torch.einsum("nvgoi,kgoi->nvk", gradients, columns))
    combined = torch.einsum("knv,nvgoi->kgoi", coefficients, gradients)
    assert_equal(compact.combine(coefficients).reshape(combined.shape), combined)
    rows = gradients.flatten(2).flatten(0, 1)
    there_and_back = compact.combine(compact.project(columns).movedim(-1, 0))
    assert_equal(there_and_back.reshape(4, -1), columns.flatten(1) @ rows.mT @ rows)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((5, 1, 3, 4, 6, 1), True),  # S (V O + I) = 18 below V O I = 72
        ((5, 1, 3, 4, 6, 4), True),  # 72 equals 72
        ((5, 1, 3, 4, 6, 5), False),
        ((5, 2, 1, 1, 9, 2), False),
    ],
)
def test_the_form_that_takes_less_memory_is_kept(shape, kept):
    n, groups, n_vectors, height, width, positions = shape
    whole = FactoredGradients(normals(n, groups, width, positions), normals(n, groups, n_vectors, height, positions))
    compact = whole.compact()
    assert (compact is whole) is kept
    if not kept:
        assert compact.inputs.numel() == n
        assert compact.vectors.numel() == n * n_vectors * groups * height * width < whole.vectors.numel() * 9


def test_the_compact_form_of_vectors_that_are_the_same_for_all_data():
    """One output and one vector: forming is cheaper, and there is one gradient for every datum."""
    inputs, vectors = normals(5, 1, 3, 1), normals(1, 1, 1, 1, 1, seed=1)
    compact = FactoredGradients(inputs, vectors).compact()
    assert len(compact.inputs) == len(compact.vectors) == 5
    assert_equal(compact.rows(), formed(inputs, vectors).flatten(2))
    assert_equal(
        FactoredGradients.gram([compact]), formed(inputs, vectors).flatten(1) @ formed(inputs, vectors).flatten(1).mT
    )


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("name", ["positions", "positions-groups", "many-positions", "one-datum"])
def test_a_rotation_after_the_positions(name, complete, memory):
    """Every contraction is that of the rotated gradients."""
    inputs, vectors = factors(name)
    _, groups, _, height, width, _ = SHAPES[name]
    by_outputs = torch.linalg.qr(normals(groups, height, height, seed=5)).Q[..., : height - (not complete)]
    by_inputs = torch.linalg.qr(normals(groups, width, width, seed=6)).Q[..., : width - (not complete)]
    expected = torch.einsum("gop,nvgoi,giq->nvgpq", by_outputs, formed(inputs, vectors), by_inputs)

    def gradients() -> FactoredGradients:
        return FactoredGradients(inputs, vectors, (by_outputs, by_inputs))

    scales = normals(2, *expected.shape[2:], seed=2).square()
    columns, coefficients = normals(3, *expected.shape[2:], seed=3), normals(3, *expected.shape[:2], seed=4)
    covariances = torch.einsum("nvgoi,rgoi,nwgoi->rnvw", expected, scales, expected)
    assert gradients().shape == expected.shape[2:]
    assert_equal(gradients().rows(), expected.flatten(2))
    assert_equal(gradients().second_moment(), expected.square().sum((0, 1)))
    assert_equal(gradients().covariances(scales), covariances)
    assert_equal(gradients().covariances(scales[:1]), covariances[:1])
    assert_equal(gradients().variances(scales), covariances.diagonal(dim1=2, dim2=3))
    assert_equal(gradients().project(columns), torch.einsum("nvgoi,kgoi->nvk", expected, columns))
    assert_equal(gradients().combine(coefficients), torch.einsum("knv,nvgoi->kgoi", coefficients, expected))


@pytest.mark.parametrize("positions", [1, 3])
def test_rotating_columns(positions):
    rotation, columns = normals(2, 4, 3), normals(5, 2, 6, 4, positions, seed=1)
    assert_equal(rotate(rotation, columns), torch.einsum("gpq,ngvps->ngvqs", rotation, columns))


@every
def test_single_precision(name, shared):
    inputs, vectors = factors(name, shared)
    expected = formed(inputs, vectors)
    scales = normals(2, *expected.shape[2:], seed=2).square()
    columns, coefficients = normals(4, *expected.shape[2:], seed=3), normals(4, *expected.shape[:2], seed=4)
    covariances = torch.einsum("nvgoi,rgoi,nwgoi->rnvw", expected, scales, expected)
    rows = expected.flatten(0, 1).flatten(1)
    own = FactoredGradients(inputs.float(), vectors.float())
    for found, reference in [
        (own.second_moment(), expected.square().sum((0, 1))),
        (own.covariances(scales), covariances),
        (own.variances(scales), covariances.diagonal(dim1=2, dim2=3)),
        (own.rows(), expected.flatten(2)),
        (own.project(columns.float()), torch.einsum("nvgoi,kgoi->nvk", expected, columns)),
        (own.combine(coefficients.float()), torch.einsum("knv,nvgoi->kgoi", coefficients, expected)),
        (FactoredGradients.gram([own]), rows @ rows.mT),
    ]:
        assert found.dtype == torch.float32
        assert_equal(found.double(), reference, FLOAT32)


def test_contractions_leave_the_factors_alone(memory):
    inputs, vectors = factors("positions")
    kept = inputs.clone(), vectors.clone()
    gradients = FactoredGradients(inputs, vectors)
    scales = torch.ones(2, *gradients.shape, dtype=torch.float64)
    for contract in (gradients.second_moment, gradients.rows, gradients.compact):
        contract()
    (
        gradients.covariances(scales),
        gradients.variances(scales),
        gradients.project(scales),
        FactoredGradients.gram([gradients]),
    )
    assert torch.equal(inputs, kept[0])
    assert torch.equal(vectors, kept[1])
    assert_equal(scales, torch.ones_like(scales), EXACT)


@pytest.mark.parametrize("name", ["one-position", "positions"])
def test_projecting_on_nothing(name):
    """A basis without columns: no curvature under priors that differ between parameters."""
    gradients = FactoredGradients(*factors(name))
    found = gradients.project(torch.zeros(0, *gradients.shape, dtype=torch.float64))
    assert found.shape == (5, 3, 0)
