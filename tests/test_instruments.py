"""Instruments of mini-batching: the bias on known populations, identities, and random matrices with known noise."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from debiased_laplace import Quadratic
from debiased_laplace.quadratic.instruments import (
    BatchSizeCurve,
    Subsets,
    alignment,
    bias_against_batch_size,
    directional_bias,
    noise_variance,
    plane,
    product_noise,
    signal_to_noise,
    spiked_prediction,
    suggest_batch_size,
)
from debiased_laplace.quadratic.spectrum import GGN
from tests.tolerances import MONTE_CARLO_Z, assert_equal, assert_unbiased, z_scores

KINDS = ["ggn", "hessian"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def population(n):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return inputs * torch.linspace(0.3, 2, n).double()[:, None], torch.randint(3, (n,), generator=generator)


def quadratic_of(model, data, chosen, kind="ggn", **options):
    chosen = torch.as_tensor(chosen)
    return Quadratic(model, (data[0][chosen], data[1][chosen]), "classification", kind, **options)


# -- the bias itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_over_all_subsets_other_batches_are_unbiased_exactly_and_the_own_overstates(kind):
    """All subsets of three out of five are equally likely: the mean over them is an expectation."""
    model, data = network(), population(5)
    reference = quadratic_of(model, data, range(5), kind)
    batches = [quadratic_of(model, data, chosen, kind) for chosen in itertools.combinations(range(5), 3)]
    bias = directional_bias(batches, reference, 3)
    for along in (bias.slopes, bias.curvatures):
        # Every batch against every batch, itself included: an independent second batch.
        assert_equal(along.batches.mean(1), along.reference)
    values = reference.eigenpairs(3)[0]
    own, along_reference = bias.curvatures.own, bias.curvatures.reference
    assert float((own.mean(0) / along_reference.mean(0)).min()) > 1.1
    assert float(own.mean(0)[0]) > float(values[0])  # the largest eigenvalue is convex
    assert float(along_reference[:, 0].max()) <= float(values[0]) + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_own_batch_overstates_and_a_second_batch_does_not(kind):
    model, data = network(), population(40)
    reference, draw = quadratic_of(model, data, range(40), kind), Subsets(*data, generator=2)
    own, other, slopes = [], [], []
    for _ in range(40):  # pairs, of which each batch is the other one's second batch
        pair = [Quadratic(model, draw(8), "classification", kind) for _ in range(2)]
        bias = directional_bias(pair, reference, 2)
        own.append((bias.curvatures.own - bias.curvatures.reference).mean(0))
        other.append((bias.curvatures.other - bias.curvatures.reference).mean(0))
        slopes.append((bias.slopes.other - bias.slopes.reference).mean(0))
    zeros = torch.zeros(2).double()
    assert float(z_scores(torch.stack(own), zeros).min()) > MONTE_CARLO_Z
    assert_unbiased(torch.stack(other), zeros)
    assert_unbiased(torch.stack(slopes), zeros)


@pytest.mark.parametrize("kind", KINDS)
def test_directional_bias_is_what_it_says(kind):
    model, data = network(), population(12)
    groups = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    batches = [quadratic_of(model, data, group, kind, l2=0.1) for group in groups]
    reference = quadratic_of(model, data, range(12), kind, l2=0.1)
    bias = directional_bias(batches, reference, 2)
    assert bias.n_data == (4, 4, 4)
    assert bool((bias.slopes.own >= 0).all())
    for m, own in enumerate(batches):
        values, directions = own.eigenpairs(2)
        assert_equal(bias.curvatures.own[m], values)
        assert_equal(bias.slopes.own[m], own.slope(directions).abs())
        signs = own.slope(directions).sign()
        assert_equal(bias.curvatures.reference[m], reference.curvature(directions))
        assert_equal(bias.slopes.reference[m], signs * reference.slope(directions))
        others = [batches[j] for j in range(3) if j != m]
        assert_equal(bias.curvatures.other[m], sum(other.curvature(directions) for other in others) / 2)
        assert_equal(bias.slopes.other[m], signs * sum(other.slope(directions) for other in others) / 2)
    # The batches are a partition: their mean is the reference.
    assert_equal(bias.curvatures.batches.mean(1), bias.curvatures.reference)


def test_means_ratios_and_their_standard_errors():
    model, data = network(), population(30)
    batches = [quadratic_of(model, data, range(i, i + 5)) for i in range(0, 30, 5)]
    along = directional_bias(batches, quadratic_of(model, data, range(30)), 2).curvatures
    mean = along.mean_own
    assert_equal(mean.value, along.own.mean(0))
    assert_equal(mean.error, along.own.std(0) / 6**0.5)  # the jackknife of a mean is the classical error
    assert_equal(along.mean_other.value, along.other.mean(0))
    assert_equal(along.ratio_own.value, along.own.mean(0) / along.reference.mean(0))
    assert_equal(along.ratio_other.value, along.other.mean(0) / along.reference.mean(0))
    # To first order the error of a ratio of means.
    residual = along.own - along.ratio_own.value * along.reference
    linear = residual.std(0) / 6**0.5 / along.reference.mean(0)
    assert bool(((along.ratio_own.error / linear).log().abs() < 0.2).all())


def test_errors_of_other_batches_count_every_batch_once():
    """Deleting a batch takes it away as a giver of directions and as a measure."""
    model, data = network(), population(20)
    batches = [quadratic_of(model, data, range(i, i + 5)) for i in range(0, 20, 5)]
    reference = quadratic_of(model, data, range(20))
    error = directional_bias(batches, reference, 2).curvatures.mean_other.error
    deleted = []
    for j in range(4):
        rest = [own for i, own in enumerate(batches) if i != j]
        deleted.append(directional_bias(rest, reference, 2).curvatures.other.mean(0))
    assert_equal(error, (torch.stack(deleted).var(0, correction=0) * 3).sqrt())
    pair = directional_bias(batches[:2], reference, 2).curvatures.mean_other
    assert bool(pair.value.isfinite().all()) and bool(pair.error.isnan().all())


# -- alignment -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_curvatures_are_weighted_means_of_eigenvalues(kind, l2):
    model, data = network(), population(8)
    first, second = (quadratic_of(model, data, chosen, kind, l2=l2) for chosen in ([0, 1, 2, 3], [4, 5, 6, 7]))
    _, directions = first.eigenpairs(4)
    k = 8 if kind == "ggn" else second.n_params  # all with curvature: (C - 1) N of the Gauss-Newton matrix
    values, others = second.eigenpairs(k)
    found = alignment(directions, others)
    assert found.overlaps.shape == (4, k)
    assert_equal(found.overlaps, (directions @ others.mT).square())
    assert_equal(found.row_sums, found.overlaps.sum(1))
    assert_equal(found.curvatures(values, remainder=l2), second.curvature(directions))
    if kind == "hessian":  # a complete basis: the rows are weights
        assert_equal(found.row_sums, torch.ones(4).double())
        assert_equal(found.overlaps @ values, second.curvature(directions))
    else:
        assert float(found.row_sums.max()) < 1


def test_the_image_of_overlaps():
    angle = torch.tensor(0.3, dtype=torch.float64)
    first = torch.eye(3, dtype=torch.float64)[:2]
    second = torch.stack([torch.stack([angle.cos(), angle.sin(), 0 * angle]), first[1]])
    found = alignment(first, second)
    assert_equal(
        found.overlaps,
        torch.stack([torch.stack([angle.cos() ** 2, 0 * angle]), torch.stack([angle.sin() ** 2, 1 + 0 * angle])]),
    )
    image = found.image()
    assert_equal(image[1], 1 + found.overlaps[1].log10() / 8)
    assert float(image[0, 1]) == 0
    with pytest.raises(ValueError, match="directions of length one"):
        alignment(2 * first, second)
    with pytest.raises(ValueError, match=r"directions \[K, D\] and \[K', D\] as rows"):
        alignment(first, second[:, :2])


# -- the plane -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_plane_shows_both_quadratics(kind):
    model, data = network(), population(12)
    first = quadratic_of(model, data, range(4), kind, l2=0.1)
    with torch.no_grad():  # another centre
        model[0].bias += 0.1
    reference = quadratic_of(model, data, range(12), kind, l2=0.1)
    found = plane(first, reference, extent=0.7)
    coordinates = torch.linspace(-0.7, 0.7, 5, dtype=torch.float64)
    values, directions = first.eigenpairs(2)
    assert_equal(found.eigenvalues, values)
    assert found.extent == 0.7
    grid = torch.cartesian_prod(coordinates, coordinates)
    points = reference.center + grid @ directions
    for own, quadratic in ((found.first, first), (found.reference, reference)):
        assert_equal(own.values(coordinates), quadratic.value(points).reshape(5, 5))
    step = found.first.minimum
    lower = first.value(reference.center + step @ directions)
    around = first.value(reference.center + (step + 0.01 * torch.randn(50, 2).double()) @ directions)
    assert bool((around >= lower).all())
    assert_equal(found.first.curvatures, torch.diag(values))


def test_a_plane_without_a_minimum_and_without_an_extent():
    model, data = network(), population(12)
    first, reference = quadratic_of(model, data, range(4)), quadratic_of(model, data, range(12))
    found = plane(first, reference)
    assert 0.5 * float(found.eigenvalues[1]) * found.extent**2 == pytest.approx(first.loss)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["first"]["minimum"] == pytest.approx(found.first.minimum.tolist())
    hessian = quadratic_of(model, data, range(4), "hessian")
    lowest = hessian.eigenpairs(hessian.n_params)[1][-2:]
    saddle = plane(first, reference)
    changed = type(saddle.first)(0.0, saddle.first.slopes, lowest @ hessian.matvec(lowest).mT)
    assert bool(changed.minimum.isnan().all())
    assert json.loads(json.dumps(changed.record()))["minimum"] == [None, None]
    with pytest.raises(ValueError, match="a positive, finite extent"):
        plane(first, reference, extent=-1.0)


# -- signal and noise ----------------------------------------------------------------------------------


def test_signal_to_noise_is_that_of_the_spectrum():
    model, (inputs, labels) = network(), population(9)
    first, second = quadratic_of(model, (inputs, labels), range(5)), quadratic_of(model, (inputs, labels), range(5, 9))
    found = signal_to_noise(first, 3)
    ggn = GGN(model, inputs[:5], labels[:5], "classification")
    values, basis = ggn.eigenpairs(3)
    theirs = ggn.directional_derivatives(basis)
    assert found.n_data == 5
    assert_equal(found.eigenvalues, values)
    assert_equal(found.curvatures, values)
    assert_equal(found.slopes.abs(), theirs.slope.abs())
    assert_equal(found.slope_snr, theirs.slope_snr)
    assert_equal(found.curvature_snr, theirs.curvature_snr)
    elsewhere = signal_to_noise(first, 3, measured_on=second)
    per_datum = second.per_datum(first.eigenpairs(3)[1])
    assert_equal(elsewhere.curvatures, second.curvature(first.eigenpairs(3)[1]))
    variance = per_datum.curvatures.var(0, correction=0)
    assert_equal(elsewhere.curvature_snr, elsewhere.curvatures.square() / variance)
    assert elsewhere.n_data == 4


# -- batch sizes and random matrices -------------------------------------------------------------------


class Additive:
    """A batch of m data whose curvature is spikes plus Wigner noise: exactly the model of the theory."""

    def __init__(self, spikes, sigma, d, m, generator):
        noise = torch.randn(d, d, generator=generator, dtype=torch.float64) * sigma / m**0.5
        self.n_params, self.n_data = d, m
        self.matrix = (noise + noise.mT) / 2**0.5  # variance sigma^2 / m off the diagonal, twice that on it
        self.data = torch.zeros(d, dtype=torch.float64)
        self.data[: len(spikes)] = torch.tensor(spikes, dtype=torch.float64)
        self.matrix.diagonal().add_(self.data)

    def matvec(self, vectors):
        return vectors @ self.matrix


def test_the_noise_of_wigner_matrices_is_found():
    generator = torch.Generator().manual_seed(0)
    d, sigma = 20, 0.7
    found, across, near = [], [], []
    for seed in range(60):
        batches = [Additive([3.0], sigma, d, 4, generator) for _ in range(3)]
        found.append(noise_variance(batches, n_vectors=5, generator=seed))
        unit = torch.eye(d, dtype=torch.float64)[:1]
        across.append(product_noise(batches, unit, across=True)[0])
        near.append(product_noise(batches, unit)[0])
    assert_unbiased(torch.tensor(found, dtype=torch.float64), torch.tensor(sigma**2 * (d + 1)))
    assert_unbiased(torch.stack(near), torch.tensor(sigma**2 * (d + 1)))
    assert_unbiased(torch.stack(across), torch.tensor(sigma**2 * (d - 1)))


def test_the_noise_of_one_datum_on_a_known_population():
    """All pairs out of five: the mean over them is an expectation, with a finite population."""
    model, data = network(), population(5)
    singles = [quadratic_of(model, data, [n]) for n in range(5)]
    vectors = torch.randn(2, singles[0].n_params, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = torch.stack([own.matvec(vectors) for own in singles])
    expected = products.var(0).sum(-1)  # with N - 1
    assert_equal(product_noise(singles, vectors), expected)
    batches = {pair: quadratic_of(model, data, pair) for pair in itertools.combinations(range(5), 2)}
    # Independent batches without replacement, with the factor of the population.
    independent = [product_noise(list(pair), vectors, 5) for pair in itertools.product(batches.values(), repeat=2)]
    assert_equal(torch.stack(independent).mean(0), expected)
    # Disjoint ones make up for it by their covariance.
    disjoint = [
        product_noise([batches[a], batches[b]], vectors)
        for a, b in itertools.product(batches, repeat=2) if not set(a) & set(b)
    ]  # fmt: skip
    assert_equal(torch.stack(disjoint).mean(0), expected)


def test_top_eigenvalues_of_random_matrices_lie_where_predicted():
    generator = torch.Generator().manual_seed(3)
    d, m, sigma, spikes = 400, 10, 0.16, [3.0, 1.5]  # noise 10.2, spread 1.02, threshold 1.01
    values, along = [], []
    for _ in range(40):
        batch = Additive(spikes, sigma, d, m, generator)
        found, vectors = torch.linalg.eigh(batch.matrix)
        values.append(found.flip(0)[:2])
        along.append((vectors.flip(1)[:, :2].square() * batch.data[:, None]).sum(0))
    noise = noise_variance([Additive(spikes, sigma, d, m, generator) for _ in range(10)], n_vectors=20)
    predicted = spiked_prediction(torch.tensor(spikes), noise, m)
    assert_unbiased(torch.stack(values), predicted.batch_eigenvalues)
    assert_unbiased(torch.stack(along), predicted.along_batch_directions)
    shift = predicted.batch_eigenvalues - torch.tensor(spikes)
    assert float(z_scores(torch.stack(values), torch.tensor(spikes) + 2 * shift).abs().min()) > MONTE_CARLO_Z
    assert float(z_scores(torch.stack(values), torch.tensor(spikes) + shift / 2).abs().min()) > MONTE_CARLO_Z


def test_below_the_threshold_a_batch_shows_the_edge_of_its_noise():
    generator = torch.Generator().manual_seed(4)
    d, sigma = 400, 0.1
    top = [torch.linalg.eigvalsh(Additive([0.5], sigma, d, 2, generator).matrix)[-1] for _ in range(40)]
    predicted = spiked_prediction(torch.tensor([0.5]), sigma**2 * d, 2)
    scale = (sigma**2 * d / 2) ** 0.5
    assert_equal(predicted.batch_eigenvalues, torch.tensor([2 * scale], dtype=torch.float64))
    # The mean of the Tracy-Widom distribution (real matrices) is what a finite dimension lacks.
    assert_unbiased(torch.stack(top), torch.tensor(scale * (2 - 1.2065 * d ** (-2 / 3))))
    assert float(predicted.overlaps[0]) == 0
    assert float(predicted.overstatement[0]) == float("inf")
    assert predicted.record()["overstatement"] == [None]


def test_predictions_are_continuous_and_end_at_the_population():
    noise = torch.tensor([4.0, 4.0])
    above, below = (spiked_prediction(torch.tensor([1.0, 2.0]) * f, noise, 1) for f in (1 + 1e-9, 1 - 1e-9))
    assert float((above.batch_eigenvalues - below.batch_eigenvalues)[1].abs()) < 1e-8
    whole = spiked_prediction(torch.tensor([1.0, 2.0, 0.0]), 5.0, 30, population=30)
    assert_equal(whole.batch_eigenvalues, torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    for size in (0, 31):
        with pytest.raises(ValueError, match="a batch size from 1 to the population of 30"):
            spiked_prediction(torch.tensor([1.0]), 5.0, size, population=30)


@pytest.mark.parametrize("size", [None, 3000])
def test_the_suggestion_is_the_smallest_size_that_will_do(size):
    eigenvalues, noise, tolerance = torch.tensor([3.0, 1.0]), torch.tensor([50.3, 20.7]), 0.25
    found = suggest_batch_size(tolerance, eigenvalues, noise, population=size)
    assert found.measured is None
    for k, m in enumerate(found.predicted.int().tolist()):
        enough, fewer = (spiked_prediction(eigenvalues, noise, own, size).overstatement[k] for own in (m, m - 1))
        assert float(enough) <= 1 + tolerance < float(fewer)
    flat = suggest_batch_size(tolerance, torch.tensor([0.0, -1.0]), 5.0, population=size).predicted
    assert flat.tolist() == [size or float("inf")] * 2
    with pytest.raises(ValueError, match="eigenvalues and a noise, or a measured curve"):
        suggest_batch_size(0.1)
    with pytest.raises(ValueError, match="a positive, finite tolerance"):
        suggest_batch_size(0.0, eigenvalues, noise)


def curve_of(excess, sizes=(10, 20, 40)):
    """A curve with known overstatements ``[S, K]``."""
    own = (1 + torch.tensor(excess, dtype=torch.float64))[:, None].expand(-1, 2, -1)
    ones = torch.ones(own.shape[-1], dtype=torch.float64)
    return BatchSizeCurve(sizes, own, torch.ones_like(own), ones, 5.0, 4 * ones, None, 10**9)


def test_the_measured_suggestion():
    curve = curve_of([[0.4, 0.05, 0.4, 0.4, -3.0], [0.2, 0.04, 0.05, 0.3, 0.05], [0.1, 0.03, 0.2, 0.2, 0.02]])
    found = suggest_batch_size(0.15, curve=curve)
    between = 20 * 2 ** (torch.tensor(0.2 / 0.15).log2().item())
    expected = [between, 10.0, float("nan"), float("nan"), 20.0]
    assert found.measured.tolist() == pytest.approx(expected, nan_ok=True)
    assert_equal(found.predicted, suggest_batch_size(0.15, curve.reference_eigenvalues, 4.0).predicted)
    assert json.loads(json.dumps(found.record(), allow_nan=False))["measured"][2:4] == [None, None]


def test_spikes_undo_the_noise_of_the_reference():
    """What theory makes of the spikes for a batch as large as the reference is what the reference has."""
    curve = replace(curve_of([[0.4, 0.1, 0.2]]), population=100, n_reference=25)
    curve = replace(curve, sizes=(25,), reference_eigenvalues=torch.tensor([9.0, 2.0, 0.5]).double())
    (predicted,) = curve.predictions
    noise = 4 * (1 / 25 - 1 / 100)
    assert predicted.batch_eigenvalues[:2].tolist() == pytest.approx([9.0, 2.0])
    assert float(curve.spikes[2]) == 0 and 0.5**2 < 4 * noise  # lost
    assert suggest_batch_size(0.1, curve=curve).predicted.tolist()[2] == 100  # all of the population
    assert_equal(replace(curve, n_reference=100).spikes, curve.reference_eigenvalues)


def test_noise_does_not_depend_on_the_chunks(monkeypatch):
    model, data = network(), population(12)
    quadratics = [quadratic_of(model, data, range(i, i + 4)) for i in (0, 4, 8)]
    vectors = quadratics[0].eigenpairs(5)[1]
    whole = product_noise(quadratics, vectors, 12, across=True)
    monkeypatch.setattr("debiased_laplace.quadratic.instruments.noise.PRODUCT_SIZE", 1)
    assert_equal(product_noise(quadratics, vectors, 12, across=True), whole)


def test_curves_are_joined():
    curve = curve_of([[0.4, 0.1], [0.2, 0.3], [0.1, 0.0]])
    parts = [
        replace(
            curve,
            sizes=curve.sizes[i : i + 1],
            batch_eigenvalues=curve.batch_eigenvalues[i : i + 1],
            along_batch_directions=curve.along_batch_directions[i : i + 1],
            noise=curve.noise + shift,
        )
        for i, shift in ((2, 1.0), (0, 0.0), (1, -1.0))
    ]
    joined = BatchSizeCurve.joined(parts)
    assert joined.record() == curve.record()
    others = replace(parts[0], reference_eigenvalues=torch.tensor([1.0, 2.0]).double())
    for wrong in (replace(parts[0], population=7), others):
        with pytest.raises(ValueError, match="curves with the same reference and population"):
            BatchSizeCurve.joined([parts[1], wrong])


@pytest.mark.parametrize("kind", KINDS)
def test_bias_against_batch_size(kind):
    model, data = network(), population(60)
    reference = quadratic_of(model, data, range(60), kind)
    draw = Subsets(*data, generator=5)
    curve = bias_against_batch_size(
        model, draw, "classification", [60, 6, 20], reference=reference, n_batches=12, n_directions=2
    )
    assert curve.sizes == (6, 20, 60)
    assert curve.population == 60
    assert curve.batch_eigenvalues.shape == curve.along_batch_directions.shape == (3, 12, 2)
    over, ratio = curve.overstatement, curve.eigenvalue_ratio
    assert_equal(over.value[2], torch.ones(2).double())  # the whole population
    assert_equal(ratio.value[2], torch.ones(2).double())
    assert bool((over.value[0] - over.value[1] > 0).all())
    assert bool(((over.value[0] - 1) / over.error[0] > MONTE_CARLO_Z).all())
    means = curve.batch_eigenvalues.mean(1) / curve.along_batch_directions.mean(1)
    assert_equal(over.value, means)
    assert_equal(ratio.value, curve.batch_eigenvalues.mean(1) / curve.reference_eigenvalues)
    # The noise along the directions is that of every datum, measured by the data one by one.
    singles = [quadratic_of(model, data, [n], kind) for n in range(60)]
    exact = product_noise(singles, reference.eigenpairs(2)[1], across=True)
    assert bool(((curve.noise_along / exact).log().abs() < 0.5).all())
    assert 0 < curve.noise < float(curve.noise_along[0])  # it is concentrated where the curvature is
    assert_equal(curve.predictions[2].batch_eigenvalues, curve.reference_eigenvalues)
    assert [own.n_data for own in curve.predict(curve.noise)] == [6, 20, 60]
    found = suggest_batch_size(0.05, curve=curve)
    assert bool((found.predicted <= 60).all()) and bool((found.measured <= 60).all())
    json.dumps(curve.record(), allow_nan=False)
    json.dumps(found.record(), allow_nan=False)


def test_second_order_perturbation_of_a_network_with_one_large_eigenvalue():
    """A linear model with one output: the noise across the top direction predicts its bias."""
    generator = torch.Generator().manual_seed(0)
    inputs = 0.3 * torch.randn(100, 5, generator=generator, dtype=torch.float64)
    inputs[:, 0] += 3
    model, targets = nn.Linear(5, 1, bias=False).double(), torch.zeros(100, 1).double()
    reference = Quadratic(model, (inputs, targets), "regression")
    draw = Subsets(inputs, targets, generator=1)
    top, direction = reference.eigenpairs(1)
    singles = [Quadratic(model, (inputs[n : n + 1], targets[n : n + 1]), "regression") for n in range(100)]
    noise = product_noise(singles, direction, across=True)
    predicted = spiked_prediction(top, noise, 10, population=100).batch_eigenvalues - top
    batches = [draw(10) for _ in range(3000)]
    drawn = torch.stack([x for x, _ in batches])
    matrices = drawn.mT @ drawn / 10
    # The first order has no bias, and most of the variance.
    samples = torch.linalg.eigvalsh(matrices)[:, -1:] - direction @ matrices @ direction[0]
    for batch, expected in zip(batches[:5], samples, strict=False):  # the matrices are those of the batches
        quadratic = Quadratic(model, batch, "regression")
        assert_equal(quadratic.eigenpairs(1)[0] - quadratic.curvature(direction), expected)
    error = samples.std(0) / len(samples) ** 0.5
    assert float(predicted / error) > 10
    assert float((samples.mean(0) - predicted).abs() / predicted) < 0.1  # higher orders, and lower eigenvalues


def test_subsets_are_uniform_and_without_replacement():
    data = {"x": torch.arange(5).double()[:, None]}
    draw = Subsets(data, torch.arange(5), generator=0)
    seen = torch.stack([torch.bincount(draw(2)[1], minlength=5) for _ in range(2000)]).double()
    assert bool((seen.sum(1) == 2).all()) and float(seen.max()) == 1
    assert_unbiased(seen, torch.full((5,), 0.4).double())
    inputs, targets = draw(5)
    assert torch.equal(inputs["x"][:, 0].long(), targets)
    with pytest.raises(ValueError, match="a batch size from 1 to all 5 data, got 6"):
        draw(6)


def test_records_are_json():
    model, data = network(), population(12)
    batches = [quadratic_of(model, data, range(i, i + 6)) for i in (0, 6)]
    reference = quadratic_of(model, data, range(12))
    for found in (
        directional_bias(batches, reference, 2),
        alignment(batches[0].eigenpairs(2)[1], batches[1].eigenpairs(2)[1]),
        plane(batches[0], reference),
        signal_to_noise(batches[0], 2),
    ):
        record = json.loads(json.dumps(found.record(), allow_nan=False))
        assert record
    record = directional_bias(batches, reference, 2).record()
    assert len(record["curvatures"]["ratio_own"]["value"]) == 2
    assert record["curvatures"]["mean_other"]["error"] == [None, None]


def test_bad_input():
    model, data = network(), population(12)
    first, second = quadratic_of(model, data, range(4)), quadratic_of(model, data, range(4, 8))
    reference = quadratic_of(model, data, range(12))
    with pytest.raises(ValueError, match="at least two batches, to see one along the directions of another; got 1"):
        directional_bias([first], reference, 2)
    with pytest.raises(ValueError, match=r"find 20 eigenvectors with curvature, got 8: .* of 4 data"):
        directional_bias([first, second], reference, 20)
    with pytest.raises(ValueError, match="the same curvature and l2, got 'ggn' with 0 and 'hessian' with 0"):
        directional_bias([first, second], quadratic_of(model, data, range(12), "hessian"), 2)
    with pytest.raises(ValueError, match="at least two batches of the same size, got 2 of the sizes"):
        product_noise([first, reference], torch.ones(1, first.n_params))
    with pytest.raises(ValueError, match="batches smaller than the population of 4"):
        product_noise([first, second], torch.ones(1, first.n_params), 4)
    arguments = (model, Subsets(*data), "classification")
    with pytest.raises(ValueError, match="at least two batches of at least one size, got 1 of"):
        bias_against_batch_size(*arguments, [4], reference=reference, n_batches=1)
    with pytest.raises(ValueError, match=r"a reference without l2, which has no noise, got l2=0.1"):
        bias_against_batch_size(*arguments, [4], reference=quadratic_of(model, data, range(12), l2=0.1))
    with pytest.raises(ValueError, match=r"find 5 eigenvectors with curvature, got 2: .* of 1 data"):
        bias_against_batch_size(*arguments, [1], reference=reference)
    with pytest.raises(ValueError, match="a size below the population of 12"):
        bias_against_batch_size(*arguments, [12], reference=reference, n_batches=2)
    with torch.no_grad():
        model[0].bias += 1
    with pytest.raises(ValueError, match="around the same parameters of the same model"):
        directional_bias([first, second], quadratic_of(model, data, range(12)), 2)
