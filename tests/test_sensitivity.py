"""Traces and largest eigenvalues of blocks, and posteriors over the parameters that have the largest curvature."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import debiased_laplace as dl
from debiased_laplace import testing
from debiased_laplace.curvature.structures import Diagonal, Full, Isotropic, Kronecker, LowRank
from debiased_laplace.evaluation.records import read_json
from debiased_laplace.fitting.fit import fit
from debiased_laplace.fitting.fitted import Fit
from debiased_laplace.network.selection import entries_of, indices_of
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.posterior.sensitivity import sensitivities
from tests.documented import code_of, executed
from tests.test_eval import ROOT, experiments, script
from tests.tolerances import assert_equal

__all__ = ["experiments"]

PROBLEMS = testing.problems()
ALL_DATA = {"split": dl.Single(), "sampler": dl.UniformSampler(None)}


def fitted(problem, structure, **options) -> Fit:
    loader = [(problem.data.inputs, problem.data.targets)]
    return fit(problem.model, loader, problem.likelihood, structure=structure, **{**ALL_DATA, **options})


def dense(problem) -> torch.Tensor:
    """The curvature of all trainable parameters."""
    n = len(problem.data)
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    return testing.dense_ggn(problem.model, problem.data.inputs, weights, problem.likelihood)


def numbers(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def places(model: nn.Module, names) -> torch.Tensor:
    """Of some parameters in the vector of all."""
    every = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return torch.cat([torch.full((size,), name in names) for name, size in every]).nonzero()[:, 0]


# -- blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [Kronecker(), Diagonal(), Full(), Full(blocks="layer"), LowRank(500)], ids=repr)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_traces_are_those_of_the_dense_curvature_and_eigenvalues_of_what_the_structure_keeps_of_it(problem, structure):
    ggn, result = dense(problem), fitted(problem, structure)
    found = sensitivities(result.posterior)
    assert sorted(name for one in found for name in one.parameters) == sorted(result.network.shapes)
    assert [one.mean_trace for one in found] == sorted((one.mean_trace for one in found), reverse=True)
    directions = testing.dense_basis(result.posterior.basis)
    kept = (directions * result.posterior.curvatures) @ directions.mT
    index = [places(problem.model, one.parameters) for one in found]
    assert [one.n_params for one in found] == list(map(len, index))
    assert_equal(numbers(one.trace for one in found), torch.stack([ggn[i, i].sum() for i in index]))
    largest = numbers(one.largest for one in found)
    exact, of_kept = (torch.stack([torch.linalg.eigvalsh(m[i][:, i])[-1] for i in index]) for m in (ggn, kept))
    assert_equal(largest, of_kept)
    assert bool((largest <= exact + 1e-9 * exact.max()).all())
    if isinstance(structure, (Full, LowRank)):
        assert_equal(largest, exact)


@pytest.mark.parametrize("structure", [Diagonal(), Full(), LowRank(500)], ids=repr)
def test_of_single_entries_those_alone_count(structure):
    problem = PROBLEMS[1]
    ggn, indices = dense(problem), torch.arange(3, len(dense(problem)), 3)
    for one in sensitivities(fitted(problem, structure, indices=indices).posterior):
        index = places(problem.model, one.parameters)
        index = index[torch.isin(index, indices)]
        assert one.n_params == len(index)
        assert_equal(numbers([one.trace]), ggn[index, index].sum()[None])


def test_random_vectors_give_the_same_traces():
    """Hutchinson's estimate with exact products of the Gauss-Newton matrix, within four standard errors."""
    from curvlinops import GGNLinearOperator

    problem = PROBLEMS[0]
    parameters = {name: p for name, p in problem.model.named_parameters() if p.requires_grad}
    data = [(problem.data.inputs, problem.data.targets)]
    operator = GGNLinearOperator(problem.model, nn.CrossEntropyLoss(), list(parameters.values()), data)
    generator = torch.Generator().manual_seed(0)
    for one in sensitivities(fitted(problem, Kronecker()).posterior):
        index = places(problem.model, one.parameters)
        signs = torch.zeros(operator.shape[0], 400, dtype=torch.float64)
        signs[index] = torch.randint(2, (len(index), 400), generator=generator).double() * 2 - 1
        estimates = (signs * (operator @ signs)).sum(0)
        assert abs(float(estimates.mean()) - one.trace) < 4 * float(estimates.std()) / 20
        assert float(estimates.std()) < one.trace  # it would see a factor of two


def test_a_posterior_has_them_and_the_prior_alone_has_none():
    problem = PROBLEMS[0]
    loader = [(problem.data.inputs, problem.data.targets)]
    posterior = dl.fit(problem.model, loader, "classification", **ALL_DATA)
    assert posterior.sensitivities() == sensitivities(posterior.offload().posterior)
    assert posterior.sensitivities()[0].parameters == ("2.weight", "2.bias")
    alone = dl.fit(problem.model, loader, "classification", structure=Isotropic())
    assert [one.trace for one in alone.sensitivities()] == [0.0, 0.0]


# -- the choice of parameters ----------------------------------------------------------------------


@pytest.mark.parametrize("structure", [Full(), LowRank(200), Diagonal()], ids=repr)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_the_entries_of_the_largest_diagonal_are_chosen_and_the_posterior_is_theirs(problem, structure):
    diagonal = dense(problem).diagonal()
    count = int((diagonal > 1e-12).sum()) // 2
    expected = diagonal.topk(count).indices.sort().values
    chosen = fitted(problem, structure, parameters=dl.by_sensitivity(count=count))
    theirs = fitted(problem, structure, indices=expected)
    assert torch.equal(_indices(problem, chosen), expected)
    assert chosen.posterior.basis.rank <= theirs.posterior.basis.rank
    for one, two in zip(
        functional_moments(chosen.network, chosen.posterior, problem.data.inputs),
        functional_moments(theirs.network, theirs.posterior, problem.data.inputs), strict=True,
    ):  # fmt: skip
        assert_equal(one, two)
    by_share = fitted(problem, structure, parameters=dl.by_sensitivity(share=count / len(diagonal)))
    assert torch.equal(_indices(problem, by_share), expected)


def _indices(problem, result: Fit) -> torch.Tensor:
    network = result.network
    free = torch.ones(network.n_params).bool() if network.free is None else network.free
    return indices_of(problem.model, network.from_vector(free.double()))


@pytest.mark.parametrize("structure", [Full(), Kronecker()], ids=repr)
def test_whole_blocks_are_taken_by_mean_trace_as_long_as_there_is_room(structure):
    problem = PROBLEMS[2]  # the token 2, the layer 6, its normalisation 4, the head 9 of 21 parameters
    order = sensitivities(fitted(problem, Diagonal()).posterior)
    for count in (8, 11, 16, 21):
        room, expected = count, set()
        for one in order:
            if one.n_params <= room:
                room -= one.n_params
                expected.update(one.parameters)
        chosen = fitted(problem, structure, parameters=dl.by_sensitivity(count=count, blocks=True))
        assert set(chosen.network.shapes) == expected
        assert chosen.network.free is None
        names = [name for name in chosen.network.shapes]
        theirs = fitted(problem, structure, parameters=names)
        assert_equal(chosen.posterior.curvatures, theirs.posterior.curvatures)


def test_the_choice_is_one_of_the_data_that_choose_directions():
    """Of two batches the first: what it overstates is measured by the second."""
    generator = torch.Generator().manual_seed(0)
    model, n = nn.Linear(30, 1).double(), 40
    x = torch.randn(n, 30, generator=generator).double()
    loader, choice = [(x, torch.zeros(n, 1).double())], dl.by_sensitivity(count=5)
    posterior = dl.fit(
        model, loader, "regression", structure=Diagonal(), parameters=choice, n_data=10_000,
        sampler=dl.UniformSampler(20), split=dl.TwoBatch(),
    )  # fmt: skip
    first = x[posterior.fitted.direction_indices].square().mean(0)
    second = x[posterior.fitted.curvature_indices].square().mean(0)
    entries = posterior.network.free
    assert_equal(first.topk(5).indices.sort().values, entries[:30].nonzero()[:, 0])
    assert len(posterior.fitted.direction_indices) == 10
    measured = posterior.posterior.curvatures[entries]
    share = 10 / 10_000
    assert_equal(measured, (share * first + (1 - share) * second)[entries[:30]])
    assert float(second[entries[:30]].mean()) < float(first[entries[:30]].mean())


def digits():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    x, y = torch.randn(200, 6, generator=generator), torch.randint(3, (200,), generator=generator)
    return model, list(zip(x.split(50), y.split(50), strict=True))


@pytest.mark.parametrize("choice", [dl.by_sensitivity(0.2), dl.by_sensitivity(0.35, blocks=True)], ids=repr)
def test_it_is_tuned_saved_loaded_and_goes_on_with_more_data(choice, tmp_path):
    model, loader = digits()
    posterior = dl.fit(model, loader, "classification", structure=Full(), parameters=choice).tune(loader)
    assert posterior.subset == "subnetwork"
    x = loader[0][0]
    predicted = posterior.predict(x).probabilities
    posterior.save(tmp_path / "posterior")
    loaded = dl.load(tmp_path / "posterior", model)
    assert_equal(loaded.predict(x).probabilities, predicted, 1e-6)
    assert loaded.subset == "subnetwork"
    assert loaded.sensitivities() == posterior.sensitivities()
    for earlier in (posterior, loaded):
        more = dl.fit(
            model, loader[:1], "classification", structure=Full(), parameters=choice, previous=earlier, seed=1
        )
        assert more.posterior.n_data == 250
        assert more.network.shapes == posterior.network.shapes
        one, two = more.network.free, posterior.network.free
        assert (one is None and two is None) or torch.equal(one, two)


def test_what_was_chosen_has_to_be_trainable_still():
    model, loader = digits()
    settings = {"structure": Full(), "parameters": dl.by_sensitivity(0.2)}
    earlier = dl.fit(model, loader, "classification", **settings)
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"got one where \['2.weight', '2.bias'\] are not"):
        dl.fit(model, loader[:1], "classification", previous=earlier, **settings)


def test_names_that_are_chosen_are_no_patterns():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.ParameterDict({"a[0]": torch.ones(3, 2), "b": torch.zeros(3)})

        def forward(self, x):
            return nn.functional.linear(x, self.p["a[0]"], self.p["b"])

    x, y = torch.randn(40, 2), torch.arange(40) % 3
    chosen = dl.by_sensitivity(share=1, blocks=True)
    posterior = dl.fit(Named(), [(x, y)], "classification", structure=Full(), parameters=chosen)
    assert set(posterior.network.shapes) == {"p.a[0]", "p.b"}
    assert dl.fit(Named(), [(x, y)], "classification", structure=Full(), parameters=chosen, previous=posterior)


def test_one_pass_over_any_stream_will_do_and_an_interrupted_fit_goes_on(tmp_path):
    model, loader = digits()
    settings = {"structure": Full(), "parameters": dl.by_sensitivity(0.2), "mc_samples": 2}
    expected = dl.fit(model, loader, "classification", **settings).posterior
    assert_equal(dl.fit(model, iter(loader), "classification", **settings).posterior.curvatures, expected.curvatures)
    checkpoint = tmp_path / "fit"
    first = dl.fit(model, loader, "classification", **settings, checkpoint=checkpoint).posterior
    again = dl.fit(model, loader, "classification", **settings, checkpoint=checkpoint).posterior
    for one in (first, again):
        assert_equal(one.curvatures, expected.curvatures, 0.0)
        assert torch.equal(one.fixed, expected.fixed)
    other = settings | {"parameters": dl.by_sensitivity(0.3)}
    with pytest.raises(ValueError, match="parameters"):
        dl.fit(model, loader, "classification", **other, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a share or a count .* got neither"),
        ({"share": 0.1, "count": 3}, "either a share or a count .* got both"),
        ({"share": 0}, "above zero and at most one, got 0"),
        ({"share": 10}, "above zero and at most one, got 10. A number of them is a count="),
        ({"share": True}, "above zero and at most one, got True"),
        ({"share": float("nan")}, "above zero and at most one, got nan"),
        ({"count": 0}, "whole number count of at least 1, got 0"),
        ({"count": 2.5}, "whole number count of at least 1, got 2.5"),
    ],
)
def test_what_says_no_share_and_no_count_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        dl.by_sensitivity(**arguments)


def test_what_does_not_fit_the_network_is_refused():
    model, loader = digits()
    for choice, message in (
        (dl.by_sensitivity(count=1000), "from 1 to 123 of the 123 parameters, got .*count=1000"),
        (dl.by_sensitivity(0.001), "from 1 to 123 of the 123 parameters, got .*share=0.001.*: 0"),
        (dl.by_sensitivity(count=20, blocks=True), "room for a whole block, got 20 of 123 .* '2', has 39"),
    ):
        with pytest.raises(ValueError, match=message):
            dl.fit(model, loader, "classification", structure=Full(), parameters=choice)
    with pytest.raises(ValueError, match="whole parameters for a Kronecker structure"):
        dl.fit(model, loader, "classification", parameters=dl.by_sensitivity(0.2))
    with pytest.raises(ValueError, match="either parameters or indices, got both"):
        batches = loader[:1]
        fit(model, batches, dl.Categorical(), parameters=dl.by_sensitivity(0.2), indices=torch.tensor([1]))


def test_indices_of_masks_are_those_they_were_made_of():
    model, _ = digits()
    indices = torch.tensor([1, 5, 71, 84, 122])
    assert torch.equal(indices_of(model, entries_of(model, indices)), indices)
    some = {name: mask for name, mask in entries_of(model, indices).items() if name != "0.weight"}
    assert torch.equal(indices_of(model, some), torch.tensor([84, 122]))


def test_a_budget_of_memory_is_that_of_the_chosen_parameters():
    model, loader = digits()
    settings = {"structure": Full(), "parameters": dl.by_sensitivity(0.35, blocks=True)}
    posterior = dl.fit(model, loader, "classification", **settings, memory_budget=600_000)
    assert posterior.network.n_params == 39
    with pytest.raises(ValueError, match="memory_budget of at least"):
        dl.fit(model, loader, "classification", structure=Full(), memory_budget=600_000)


# -- the experiment --------------------------------------------------------------------------------


@pytest.fixture
def experiment(experiments):
    import sensitivity

    return sensitivity


@pytest.mark.parametrize("budget", [3, 4.3, 5])
def test_no_other_bits_within_the_budget_cost_less(budget, experiment):
    random, sizes, choices = np.random.default_rng(0), [40, 7, 300], experiment.BITS
    costs = random.random((3, 1)) * 4.0 ** -np.array(choices) * (1 + random.random((3, len(choices))))
    chosen = experiment.allocate(costs, sizes, budget)
    total = {
        bits: sum(costs[i, choices.index(b)] for i, b in enumerate(bits))
        for bits in itertools.product(choices, repeat=3)
        if np.dot(bits, sizes) <= budget * sum(sizes)
    }
    assert total[tuple(chosen)] == min(total.values())


def test_rounding_is_to_the_nearest_of_so_many_numbers(experiment):
    weight = torch.linspace(-1, 0.7, 500).double()
    for bits in (2, 3, 5):
        rounded = experiment.rounded_to(weight, bits)
        levels = torch.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1)).double() / (2 ** (bits - 1) - 1)
        assert len(levels) == 2**bits - 1
        nearest = levels[(weight[:, None] - levels).abs().argmin(1)]
        assert_equal(rounded, nearest)
        assert experiment.squared_error(weight, bits) == pytest.approx(float((weight - nearest).square().sum()))


def test_the_predicted_losses_are_quadratic_forms_of_the_dense_curvature(experiment):
    problem = PROBLEMS[0]
    ggn, generator = dense(problem), torch.Generator().manual_seed(0)
    change = torch.randn(len(ggn), generator=generator, dtype=torch.float64)
    network = fitted(problem, Diagonal()).network
    found = experiment.quadratic(problem.model, network.from_vector(change), problem.data.inputs)
    assert_equal(numbers([found]), 0.5 * (change @ ggn @ change)[None])


def test_distances_of_variances(experiment):
    generator = torch.Generator().manual_seed(0)
    reference, noise = torch.rand(2, 30, generator=generator, dtype=torch.float64)
    assert experiment.distances(0.25 * reference, reference)["kept"] == pytest.approx(0.25, rel=1e-12)
    assert experiment.distances(0.25 * reference, reference)["error"] == pytest.approx(0, abs=1e-7)
    best = torch.linalg.lstsq(noise[:, None], reference[:, None]).solution
    expected = float((noise * best[0] - reference).norm() / reference.norm())
    assert experiment.distances(noise, reference)["error"] == pytest.approx(expected, rel=1e-9)


def test_the_page_s_code_runs(capsys):
    model, loader = digits()
    assert len(code_of(ROOT / "docs" / "sensitivity.md")) == 2
    names = executed(ROOT / "docs" / "sensitivity.md", dl=dl, model=model, train_loader=loader)
    assert capsys.readouterr().out.count("\n") == 2
    assert repr(names["posterior"]) == "<Laplace posterior of 6 of 123 parameters>"


def test_a_quick_run_fills_the_page(tmp_path):
    shutil.copy(ROOT / "docs" / "sensitivity.md", tmp_path)
    (tmp_path / "records").mkdir()
    arguments = ("--tasks", "digits", "--quick", "--out", str(tmp_path / "out"), "--docs", str(tmp_path))
    done = script("sensitivity.py", *arguments, "--cache", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    of = read_json(tmp_path / "records" / "sensitivity.json")["tasks"]["digits"]
    (found,) = of["subnetworks"]
    kept = {name: of["kept"] for name, of in found["variances"].items()}
    assert 0 < kept["random"] < kept["largest curvature"] < 1.001
    assert found["overstated"] > 0.5
    assert set(of["bits"][0]["budgets"]) == {"3", "4", "5"}
    text = (tmp_path / "sensitivity.md").read_text()
    assert f"| digits | random | {100 * kept['random']:.1f} |" in text
    assert (tmp_path / "sensitivity.png").stat().st_size > 5000
    again = script("sensitivity.py", *arguments)  # what is there is used
    assert again.returncode == 0, again.stderr
    assert "subnetworks" not in again.stderr
