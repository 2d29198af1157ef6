"""The empirical Fisher of stored gradients: its products, the window, scores for pruning, the seams it is on."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import partial

import backpack
import pytest
import torch
from backpack.extensions import BatchGrad
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace import GGN, EmpiricalFisher, LowRank, Quadratic, Single, UniformSampler, testing
from debiased_laplace._checks import NonFiniteError
from debiased_laplace.likelihoods import Gaussian
from debiased_laplace.quadratic import fisher as module
from debiased_laplace.quadratic.optim import conjugate_gradients
from debiased_laplace.testing.dense import all_tensors
from tests.documented import DOCS, ROOT, executed
from tests.test_spectrum import gradients_of
from tests.test_vivit import convolutional
from tests.tolerances import FLOAT32, assert_equal, assert_unbiased

PROBLEMS = testing.problems()


@pytest.fixture(params=PROBLEMS, ids=lambda p: p.name)
def problem(request):
    return request.param


def fisher_of(problem, part: slice = slice(None), **options) -> EmpiricalFisher:
    batch = problem.data.inputs[part], problem.data.targets[part]
    return EmpiricalFisher(problem.model, batch, problem.likelihood, **options)


def dense(gradients: Tensor, damping: float = 0.0) -> Tensor:
    return gradients.mT @ gradients / len(gradients) + damping * torch.eye(gradients.shape[1]).double()


def some_vectors(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def assert_same_rows(found: Tensor, expected: Tensor) -> None:
    """In any order."""
    assert found.shape == expected.shape
    assert_equal(found.mT @ found, expected.mT @ expected)


# -- the matrix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-3, 0.1, 3.0])
def test_products_are_those_of_the_dense_matrix_and_its_inverse(problem, damping):
    fisher, gradients = fisher_of(problem), gradients_of(problem)
    vector = some_vectors(2, 3, gradients.shape[1])
    assert_equal(fisher.matvec(vector, damping), vector @ dense(gradients, damping))
    inverse = dense(gradients, damping).inverse()
    assert_equal(fisher.inverse_matvec(vector, damping), vector @ inverse)
    assert_equal(fisher.inverse_matvec(vector[0, 0], damping), inverse @ vector[0, 0])
    assert_equal(fisher.inverse_diagonal(damping), inverse.diagonal())


@pytest.mark.parametrize("problem", PROBLEMS[:2], ids=lambda p: p.name)  # of the others the matrix is singular
def test_without_damping_it_is_the_pseudo_inverse(problem):
    fisher, matrix = fisher_of(problem), dense(gradients_of(problem))
    vector = some_vectors(3, len(matrix))
    assert_equal(fisher.matvec(fisher.inverse_matvec(fisher.matvec(vector))), vector @ matrix)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradients_of_data_are_those_of_torch_and_backpack(chunk_size):
    model, inputs = convolutional()
    labels = torch.arange(7) % 3
    found = EmpiricalFisher(model, (inputs, labels), "classification", chunk_size=chunk_size).gradients

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    own = {name: p.detach() for name, p in model.named_parameters()}
    by_name = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(own, inputs, labels)
    assert_equal(found, torch.cat([by_name[name].flatten(1) for name in own], 1))
    extended = backpack.extend(copy.deepcopy(model))
    with backpack.backpack(BatchGrad()):
        backpack.extend(nn.CrossEntropyLoss(reduction="sum"))(extended(inputs), labels).backward()
    assert_equal(found, torch.cat([p.grad_batch.flatten(1) for p in extended.parameters()], 1))


def test_in_single_precision_the_inverse_is_that_of_the_stored_gradients(monkeypatch):
    """However small the damping is, and in pieces of a few columns."""
    monkeypatch.setattr(module, "PIECE", 5 * 64)
    model, inputs = convolutional()
    labels = torch.arange(7) % 3
    fisher = EmpiricalFisher(model.float(), (inputs.float(), labels), "classification", window=64)
    assert fisher.gradients.dtype == torch.float32
    exact = EmpiricalFisher(model.double(), (inputs, labels), "classification")
    assert_equal(fisher.gradients.double(), exact.gradients, FLOAT32)
    matrix = dense(fisher.gradients.double(), 1e-5)
    vector = some_vectors(len(matrix))
    assert_equal(fisher.inverse_matvec(vector, 1e-5), torch.linalg.solve(matrix, vector))
    assert_equal(fisher.inverse_diagonal(1e-5), matrix.inverse().diagonal())


def test_labels_of_the_model_itself_make_it_unbiased():
    problem = PROBLEMS[0]
    model, inputs, vector = problem.model, problem.data.inputs, some_vectors(31)
    probabilities = model(inputs).detach().softmax(-1)
    found = []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        found.append(EmpiricalFisher(model, (inputs, labels), "classification").matvec(vector))
    ggn = GGN(model, inputs, torch.zeros(len(inputs), dtype=torch.long), "classification")
    assert_unbiased(torch.stack(found), ggn.matvec(vector))


# -- the window ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(3, 4), (1, 1, 1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("window", [1, 3, 7, 20])
def test_a_sliding_window_is_the_recomputation_from_its_gradients(problem, window, sizes):
    gradients = gradients_of(problem)[:7]
    parts = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    fisher = fisher_of(problem, parts[0], window=window)
    vector = some_vectors(gradients.shape[1])
    for part in parts[1:]:
        fisher.inverse_matvec(vector, 0.1)  # what is known of the old ones must not stay
        fisher.add((problem.data.inputs[part], problem.data.targets[part]))
    newest = gradients[-window:]
    assert fisher.n_gradients == len(newest)
    assert_same_rows(fisher.gradients, newest)
    assert_equal(fisher.inverse_matvec(vector, 0.1), torch.linalg.solve(dense(newest, 0.1), vector))
    assert_equal(fisher.inverse_diagonal(0.1), dense(newest, 0.1).inverse().diagonal())


def test_a_loader_is_read_once_and_gradients_may_come_from_anywhere():
    problem = PROBLEMS[0]
    inputs, targets = problem.data.inputs, problem.data.targets
    batches = iter([(inputs[:3], targets[:3]), (inputs[3:], targets[3:])])
    fisher = EmpiricalFisher(problem.model, batches, problem.likelihood, window=9)
    assert_equal(fisher.gradients, gradients_of(problem))
    more = some_vectors(12, 31)
    fisher.append(more[:4])
    assert_same_rows(fisher.gradients, torch.cat([gradients_of(problem), more[:4]])[-9:])
    fisher.append(more)
    assert_same_rows(fisher.gradients, more[-9:])
    assert_equal(fisher.inverse_matvec(more, 0.2), more @ dense(more[-9:], 0.2).inverse())


def test_memory_is_the_window_times_the_parameters():
    problem = PROBLEMS[0]
    fisher = fisher_of(problem, window=5)
    fisher.inverse_matvec(some_vectors(31), 0.1)
    held = [t for t in all_tensors([fisher._rows, fisher._gram, fisher._known]) if t.ndim == 2]
    assert fisher.memory == 8 * 5 * 31 + 16 * 5**2 == sum(t.untyped_storage().nbytes() for t in held)


# -- pruning ---------------------------------------------------------------------------------------


def quadratic_problem() -> tuple[nn.Module, Tensor, Tensor]:
    """Linear regression where residuals are one and minus one, so that the empirical Fisher is the Hessian.

    Every input comes twice: the gradient is zero.
    """
    torch.manual_seed(0)
    model = nn.Linear(5, 1, bias=False).double()
    inputs = torch.randn(12, 5).double()
    outputs = model(inputs).detach()
    return model, torch.cat([inputs, inputs]), torch.cat([outputs + 1, outputs - 1])


def rise(model: nn.Module, inputs: Tensor, targets: Tensor, removed: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """By least squares: the smallest rise of the loss with a penalty without some weights, and the others there."""
    weights = model.weight.detach()[0]
    rows = torch.cat([inputs / len(inputs) ** 0.5, damping**0.5 * torch.eye(5).double()])
    wanted = torch.cat([targets[:, 0] / len(inputs) ** 0.5, damping**0.5 * weights])
    left = torch.linalg.lstsq(rows[:, ~removed], wanted[:, None], driver="gelsd").solution[:, 0]
    best = torch.zeros(5).double()
    best[~removed] = left
    return 0.5 * ((rows @ best - wanted).square().sum() - (rows @ weights - wanted).square().sum()), best


def test_scores_are_what_removing_a_weight_costs_on_a_quadratic():
    model, inputs, targets = quadratic_problem()
    fisher = EmpiricalFisher(model, (inputs, targets), Gaussian())
    expected = [rise(model, inputs, targets, torch.arange(5) == i, 0.01)[0] for i in range(5)]
    assert_equal(fisher.pruning_scores(0.01), torch.stack(expected))


@pytest.mark.parametrize("removed", [[2], [0, 3], [0, 1, 3, 4], [], [0, 1, 2, 3, 4]], ids=str)
def test_pruned_weights_are_those_of_least_loss_on_a_quadratic(removed):
    model, inputs, targets = quadratic_problem()
    mask = torch.isin(torch.arange(5), torch.tensor(removed))
    found = EmpiricalFisher(model, (inputs, targets), Gaussian(), window=30).pruned(mask, 0.01)
    expected = rise(model, inputs, targets, mask, 0.01)[1] if len(removed) < 5 else torch.zeros(5).double()
    assert bool((found[mask] == 0).all())
    assert_equal(found, expected)


def test_pruned_weights_are_those_of_the_dense_quadratic(problem):
    fisher, matrix = fisher_of(problem), dense(gradients_of(problem), 0.05)
    weights = torch.cat([p.detach().flatten() for p in problem.model.parameters() if p.requires_grad])
    mask = some_vectors(len(weights)) > 0.3
    kept = ~mask
    expected = torch.zeros_like(weights)
    moved = torch.linalg.solve(matrix[kept][:, kept], matrix[kept][:, mask] @ weights[mask])
    expected[kept] = weights[kept] + moved
    assert_equal(fisher.pruned(mask, 0.05), expected)
    for index in range(3):
        one = torch.arange(len(weights)) == index
        step = fisher.pruned(one, 0.05) - weights
        assert_equal(fisher.pruning_scores(0.05)[index], 0.5 * step @ matrix @ step)


# -- the seams -------------------------------------------------------------------------------------


def test_the_posterior_with_it_is_the_low_rank_structure_over_these_gradients():
    problem = PROBLEMS[0]
    batch = problem.data.inputs, problem.data.targets
    fitted = dl.fit(
        problem.model, [batch], problem.likelihood, structure=LowRank(7), curvature="empirical_fisher",
        sampler=UniformSampler(None), split=Single(), prior_precision=0.7,
    ).posterior  # fmt: skip
    vector, scale = some_vectors(2, 31), float(fitted.scale)
    expected = fisher_of(problem).inverse_matvec(vector, 0.7 / scale) / scale
    assert_equal(fitted.covariance_matvec(vector), expected)


def test_as_a_preconditioner_that_is_the_matrix_one_step_of_conjugate_gradients_is_enough():
    model, inputs, targets = quadratic_problem()
    inverse = partial(EmpiricalFisher(model, (inputs, targets), Gaussian()).inverse_matvec, damping=0.3)
    quadratic = Quadratic(model, (inputs, targets + inputs[:, :1]), Gaussian(), l2=0.3)
    step = conjugate_gradients(quadratic, n_steps=1, preconditioner=inverse).delta
    exact = -torch.linalg.solve(inputs.mT @ inputs / 24 + 0.3 * torch.eye(5).double(), quadratic.gradient)
    assert_equal(step, exact)


# -- what is refused -------------------------------------------------------------------------------


def test_what_is_refused():
    problem = PROBLEMS[0]
    fisher = fisher_of(problem)
    before = fisher.matvec(some_vectors(31))
    with pytest.raises(ValueError, match=r"gradients of shape \[k, 31\], one entry for each parameter, got \(31,\)"):
        fisher.append(some_vectors(31))
    with pytest.raises(NonFiniteError, match="finite numbers in the gradients, got 1 of 62 that are not"):
        fisher.append(torch.cat([some_vectors(61), torch.tensor([torch.nan])]).view(2, 31))
    single = EmpiricalFisher(nn.Linear(2, 2), (torch.randn(4, 2), torch.tensor([0, 1, 0, 1])), "classification")
    with pytest.raises(NonFiniteError, match="finite numbers in the gradients, got 6 of 6 that are not"):
        single.append(torch.full((1, 6), 1e39, dtype=torch.float64))  # infinite in the precision of the window
    assert_equal(fisher.matvec(some_vectors(31)), before)
    with pytest.raises(ValueError, match=r"a positive, finite damping, got 0"):
        fisher.inverse_diagonal(0.0)
    with pytest.raises(ValueError, match=r"boolean mask of shape \[31\], got torch.float64 of shape \[31\]"):
        fisher.pruned(some_vectors(31), 0.1)
    with pytest.raises(ValueError, match=r"window"):
        fisher_of(problem, window=0)
    with pytest.raises(ValueError, match=r"Expected a batch with data, or a list or loader of such batches, got none"):
        EmpiricalFisher(problem.model, [], problem.likelihood)


def test_the_model_and_the_random_state_stay_as_they_were():
    problem = PROBLEMS[0]
    data = torch.utils.data.TensorDataset(problem.data.inputs, problem.data.targets)
    before, state = [p.clone() for p in problem.model.parameters()], torch.get_rng_state()
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
    EmpiricalFisher(problem.model, loader, problem.likelihood).add(loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(problem.model.parameters(), before, strict=True))


# -- the page --------------------------------------------------------------------------------------


def test_the_code_of_the_page_runs_as_it_stands():
    problem = PROBLEMS[0]
    batch = problem.data.inputs, problem.data.targets
    names = executed(
        DOCS / "empirical_fisher.md", dl=dl, model=problem.model, loader=[batch], x=batch[0], y=batch[1],
        gradient=some_vectors(31), gradients=some_vectors(3, 31),
    )  # fmt: skip
    assert names["fisher"].n_gradients == 17
    assert len(names["removed"]) == 27
    assert names["posterior"].posterior.basis.rank == 7


def test_the_experiment_has_a_quick_form(tmp_path):
    (tmp_path / "records").mkdir()
    page = tmp_path / "empirical_fisher.md"
    page.write_text((DOCS / "empirical_fisher.md").read_text())
    command = [sys.executable, "eval/empirical_fisher.py", "--quick", "--out", str(tmp_path), "--docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "records" / "empirical_fisher.json").read_text())
    assert set(record["seeds"][0]["methods"]["magnitude"]) == {"0.9"}
    assert record["costs"]["256"]["memory"] == 4 * 256 * 9818 + 16 * 256**2
    assert "| empirical Fisher |" in page.read_text()
