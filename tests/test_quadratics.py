"""The quadratic of a batch against dense matrices of automatic differentiation, and against curvlinops."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from debiased_laplace import Quadratic, testing
from debiased_laplace._checks import NonFiniteError
from debiased_laplace.curvature.structures import lanczos
from debiased_laplace.likelihoods import Bernoulli, Categorical, Gaussian
from debiased_laplace.network.network import Network
from debiased_laplace.network.tracing import WrittenOut
from debiased_laplace.quadratic import quadratic as module
from debiased_laplace.quadratic.spectrum import GGN
from tests.datasets import LIKELIHOODS, targets, valid
from tests.networks import ZOO, Case
from tests.tolerances import assert_equal

KINDS = ["ggn", "hessian"]
L2 = 0.3


def total_loss(model, batch, likelihood, l2=0.0):
    """The mean loss plus regulariser as a function of named parameters, and the parameters."""
    inputs, labels = batch
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters):
        used = with_constant_padding(model, parameters)
        outputs = torch.func.functional_call(model, used, (inputs.clone(),)).reshape(len(labels), -1)
        squares = sum(p.square().sum() for p in parameters.values())
        return likelihood.loss(outputs, labels).sum() / len(labels) + l2 / 2 * squares

    return loss, parameters


def with_constant_padding(model, parameters):
    """The padding row of an embedding as a constant: torch's second derivatives in it are not symmetric."""
    constant = dict(parameters)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            is_padding = torch.arange(len(layer.weight)) == layer.padding_idx
            table = parameters[f"{name}.weight"]
            constant[f"{name}.weight"] = torch.where(is_padding[:, None], layer.weight.detach(), table)
    return constant


def flat(named):
    return torch.cat([value.reshape(-1) for value in named.values()])


def dense_hessian(model, batch, likelihood, l2=0.0):
    loss, parameters = total_loss(model, batch, likelihood)
    sizes = {name: p.numel() for name, p in parameters.items()}
    with sdpa_kernel(SDPBackend.MATH):
        # Forward over reverse: two reverse passes nested in torch.func are wrong for layer normalisation.
        try:
            rows = torch.func.jacfwd(torch.func.grad(loss))(parameters)
        except NotImplementedError:  # of bags and packed sequences torch has first derivatives alone
            with WrittenOut():
                rows = torch.func.jacfwd(torch.func.grad(loss))(parameters)
    matrix = torch.cat([torch.cat([rows[a][b].reshape(sizes[a], sizes[b]) for b in sizes], 1) for a in sizes])
    # Forward mode does not know that the row of a padding index has no gradient: its columns are zero as its rows are.
    return matrix * matrix.abs().sum(1).bool() + l2 * torch.eye(len(matrix), dtype=torch.float64)


def dense(model, batch, likelihood, kind, l2=0.0):
    if kind == "hessian":
        return dense_hessian(model, batch, likelihood, l2)
    inputs, labels = batch
    weights = torch.full((len(labels),), 1 / len(labels), dtype=torch.float64)
    matrix = testing.dense_ggn(model, inputs, weights, likelihood)
    return matrix + l2 * torch.eye(len(matrix)).double()


def example(name="mlp", likelihood=None, n=6, seed=1):
    case = ZOO[name]
    likelihood = valid(likelihood or Categorical(), case)
    model = case.model()
    return model, (case.inputs(n, seed=seed), targets(likelihood, n, case.n_outputs, seed)), likelihood


@cache
def dense_of_zoo(name, kind):
    """The matrix of :func:`example`, once for all tests."""
    return dense(*example(name), kind)


def scalar(number):
    return torch.tensor(number, dtype=torch.float64)


def vectors(d, k=3, seed=0):
    return torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda likelihood: type(likelihood).__name__)
@pytest.mark.parametrize("name", ["mlp", "cnn", "lone-parameters", "attention"])
def test_everything_equals_the_dense_quadratic(name, likelihood, kind):
    model, batch, likelihood = example(name, likelihood)
    quadratic = Quadratic(model, batch, likelihood, kind, l2=L2)
    loss, parameters = total_loss(model, batch, likelihood, L2)
    matrix, center = dense(model, batch, likelihood, kind, L2), flat(parameters)
    gradient = flat(torch.func.grad(loss)(parameters))
    assert_equal(scalar(quadratic.loss), loss(parameters))
    assert_equal(quadratic.center, center)
    assert_equal(quadratic.gradient, gradient)
    assert (quadratic.n_params, quadratic.n_data) == (len(center), len(batch[1]))
    u = vectors(len(center))
    assert_equal(quadratic.slope(u), u @ gradient)
    assert_equal(quadratic.matvec(u), u @ matrix)
    assert_equal(quadratic.curvature(u), torch.einsum("kd,de,ke->k", u, matrix, u))
    step = u - center
    value = loss(parameters) + step @ gradient + 0.5 * torch.einsum("kd,de,ke->k", step, matrix, step)
    assert_equal(quadratic.value(u), value)
    for method in (quadratic.slope, quadratic.curvature, quadratic.matvec, quadratic.value, quadratic.true_loss):
        assert_equal(method(u[1]), method(u)[1])  # one vector, and its shape
    network = Network(model)
    shifted = torch.stack([loss(network.from_vector(point)) for point in u])
    assert_equal(quadratic.true_loss(u), shifted)
    assert_equal(quadratic.true_loss(center), loss(parameters))
    assert_equal(quadratic.value(center), loss(parameters))


def test_layers_whose_second_derivative_torch_cannot_batch(monkeypatch):
    """As group normalisation in torch 2.11; one vector after the other then."""
    model, batch, likelihood = example("group-norm", n=4)
    quadratic, original = Quadratic(model, batch, likelihood, "hessian"), torch.autograd.grad
    quadratic._network.vector_chunk = 2
    u = vectors(len(quadratic.gradient))
    expected = quadratic.matvec(u)

    def grad(*arguments, is_grads_batched=False, **keywords):
        if is_grads_batched:
            raise RuntimeError("Batching rule not implemented")
        return original(*arguments, **keywords)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    assert_equal(quadratic.matvec(u), expected)


@pytest.mark.parametrize("vector_chunk", [1, 2])
@pytest.mark.parametrize("name", ZOO)
def test_products_with_every_network_of_the_zoo(name, vector_chunk):
    """One vector at a time, and as on an accelerator several through one batched backward pass."""
    model, batch, likelihood = example(name)
    for kind in KINDS:
        matrix = dense_of_zoo(name, kind)
        quadratic = Quadratic(model, batch, likelihood, kind)
        quadratic._network.vector_chunk = vector_chunk
        u = vectors(len(matrix))
        assert_equal(quadratic.matvec(u), u @ matrix)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda likelihood: type(likelihood).__name__)
def test_curvlinops_agrees(likelihood):
    model, batch, likelihood = example("mlp", likelihood)
    n_outputs = 2
    losses = {
        Categorical: nn.CrossEntropyLoss(reduction="mean"),
        Gaussian: nn.MSELoss(reduction="mean"),
        Bernoulli: nn.BCEWithLogitsLoss(reduction="mean"),
    }
    # Means over data and outputs: theirs times C is ours; the squared loss has a half besides.
    factor = {Categorical: 1, Gaussian: n_outputs / 2, Bernoulli: n_outputs}[type(likelihood)]
    parameters = list(model.parameters())
    for kind, operator in (("ggn", GGNLinearOperator), ("hessian", HessianLinearOperator)):
        theirs = operator(model, losses[type(likelihood)], parameters, [batch], check_deterministic=False)
        u = vectors(sum(p.numel() for p in parameters))
        expected = torch.stack([factor * (theirs @ row) for row in u])
        assert_equal(Quadratic(model, batch, likelihood, kind).matvec(u), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_several_batches_are_their_union(kind):
    model, (inputs, labels), likelihood = example("mlp", n=9)
    whole = Quadratic(model, (inputs, labels), likelihood, kind, l2=L2)
    ragged = [(inputs[:4], labels[:4]), (inputs[4:5], labels[4:5]), (inputs[5:], labels[5:])]
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=4, shuffle=True)
    state = torch.get_rng_state()
    u = vectors(whole.n_params)
    for quadratic in (
        Quadratic(model, ragged, likelihood, kind, l2=L2),
        Quadratic(model, loader, likelihood, kind, l2=L2),
        Quadratic(model, [inputs, labels], likelihood, kind, l2=L2),  # one batch, as a default collation has it
        Quadratic(model, (inputs, labels), likelihood, kind, l2=L2, chunk_size=2),
    ):
        assert quadratic.n_data == 9
        assert_equal(scalar(quadratic.loss), scalar(whole.loss))
        assert_equal(quadratic.gradient, whole.gradient)
        assert_equal(quadratic.matvec(u), whole.matvec(u))
        assert_equal(quadratic.eigenpairs(4)[0], whole.eigenpairs(4)[0])
        assert_equal(quadratic.true_loss(u), whole.true_loss(u))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_quadratic_on_a_span_in_either_mode_of_differentiation(name, kind):
    model, batch, likelihood = example(name)
    matrix = dense_of_zoo(name, kind)
    matrix = matrix + L2 * torch.eye(len(matrix)).double()
    quadratic = Quadratic(model, batch, likelihood, kind, l2=L2, chunk_size=4)
    u = vectors(quadratic.n_params)
    slopes, curvatures = quadratic.projected(u)
    assert_equal(slopes, u @ quadratic.gradient)
    assert_equal(curvatures, u @ matrix @ u.mT)
    assert_equal(quadratic.curvature(u), (u @ matrix @ u.mT).diagonal())
    back = Quadratic(model, batch, likelihood, kind, l2=L2)
    back._model.has_forward_mode = False
    assert_equal(back.projected(u)[1], curvatures)
    assert_equal(back.matvec(u), quadratic.matvec(u))
    assert_equal(back.per_datum(u).curvatures, quadratic.per_datum(u).curvatures)


class Doubled(torch.autograd.Function):
    """An operation that has no forward mode."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Custom(nn.Linear):
    def forward(self, x):
        return Doubled.apply(super().forward(x))


def test_operations_without_a_forward_mode_take_double_backward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Custom(4, 3)).double()
    twin = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    twin.load_state_dict({name: 2 * p if name.startswith("2") else p for name, p in model.state_dict().items()})
    batch = torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 1, 0])
    quadratic = Quadratic(model, batch, "classification")
    u = vectors(quadratic.n_params)
    scale = torch.cat(
        [torch.full((p.numel(),), 2.0 if name.startswith("2") else 1.0) for name, p in model.named_parameters()]
    )
    expected = dense(twin, batch, Categorical(), "ggn") * scale * scale[:, None]
    assert_equal(quadratic.matvec(u), u @ expected)
    assert quadratic._model.has_forward_mode is False
    assert_equal(quadratic.projected(u)[1], u @ expected @ u.mT)


class Frozen(nn.Module):
    """A body that is run without gradients though its parameters are trainable."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        with torch.no_grad():
            x = torch.tanh(self.body(x))
        return self.head(x)


def test_gradients_that_the_model_stops_are_stopped():
    torch.manual_seed(0)
    model, batch = Frozen().double(), (torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 1, 0]))
    quadratic = Quadratic(model, batch, "classification")
    u = vectors(quadratic.n_params)
    u[0, 16:] = 0
    assert float(quadratic.curvature(u)[0]) == 0
    assert quadratic._model.has_forward_mode is False
    matrix = quadratic.matvec(torch.eye(quadratic.n_params).double())
    assert_equal(matrix, matrix.mT)
    assert_equal(quadratic.curvature(u), (u @ matrix @ u.mT).diagonal())


def test_a_lack_of_memory_is_no_lack_of_forward_mode(monkeypatch):
    model, batch, likelihood = example()
    quadratic = Quadratic(model, batch, likelihood)

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("debiased_laplace.quadratic.derivatives.jvp", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        quadratic.matvec(vectors(quadratic.n_params))


def test_some_parameters_while_the_others_move_on():
    model, batch, likelihood = example("mlp")
    quadratic = Quadratic(model, batch, likelihood, parameters="last_layer")
    u = vectors(quadratic.n_params)
    before, values = quadratic.matvec(u), quadratic.eigenpairs(2)[0]
    fresh = Quadratic(model, batch, likelihood, parameters="last_layer")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert_equal(quadratic.matvec(u), before)
    assert_equal(fresh.eigenpairs(2)[0], values)


def test_small_eigenvalues_of_a_large_network_are_no_lack_of_rank():
    """In float32, with more parameters than data."""
    torch.manual_seed(0)
    model = nn.Linear(20_000, 1, bias=False)
    inputs = torch.zeros(2, 20_000)
    inputs[0, 0], inputs[1, 1] = 1.0, 0.005
    quadratic = Quadratic(model, (inputs, torch.zeros(2, 1)), "regression")
    values, rows = quadratic.eigenpairs(2)
    assert values.tolist() == pytest.approx([0.5, 1.25e-5], rel=1e-4)
    assert quadratic.curvature(rows).tolist() == pytest.approx(values.tolist(), rel=1e-4)


def test_no_vectors_at_all():
    model, batch, likelihood = example()
    for kind in KINDS:
        slopes, curvatures = Quadratic(model, batch, likelihood, kind).projected(
            vectors(1)[:0, :0].reshape(0, 0).new_zeros(0, sum(p.numel() for p in model.parameters()))
        )
        assert slopes.shape == (0,) and curvatures.shape == (0, 0)


@pytest.mark.parametrize("l2", [0.0, L2])
@pytest.mark.parametrize("path", ["as it comes", "dense", "lanczos"])
@pytest.mark.parametrize("kind", KINDS)
def test_eigenpairs_are_those_of_the_dense_matrix(monkeypatch, kind, path, l2):
    model, batch, likelihood = example("cnn", n=7)
    if path != "as it comes":
        monkeypatch.setattr(module, "GRAM_SIZE", 0)
        monkeypatch.setattr(lanczos, "DENSE_SIZE", 1000 if path == "dense" else 0)
        monkeypatch.setattr(lanczos, "FALLBACK_SIZE", 0)
    matrix = dense(model, batch, likelihood, kind, l2)
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:4]
    values, directions = Quadratic(model, batch, likelihood, kind, l2=l2).eigenpairs(4)
    assert_equal(values, expected)
    assert_equal(directions @ directions.mT, torch.eye(4).double())
    assert_equal(directions @ matrix, values[:, None] * directions)
    fewer = Quadratic(model, batch, likelihood, kind, l2=l2)
    fewer.eigenpairs(4)
    assert_equal(fewer.eigenpairs(2)[0], expected[:2])
    assert fewer.eigenpairs(2)[1].shape == (2, len(matrix))


def test_the_directions_are_in_the_order_of_the_package():
    model, (inputs, labels), likelihood = example("mlp")
    ggn = GGN(model, inputs, labels, likelihood)
    quadratic = Quadratic(model, (inputs, labels), likelihood)
    u = vectors(quadratic.n_params)
    assert_equal(quadratic.matvec(u), ggn.matvec(u))
    assert_equal(quadratic.center, ggn.network.mean())


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda likelihood: type(likelihood).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_every_datum(kind, likelihood):
    model, (inputs, labels), likelihood = example("cnn", likelihood)
    quadratic = Quadratic(model, (inputs, labels), likelihood, kind, l2=L2, chunk_size=4)
    u = vectors(quadratic.n_params, 2)
    actual = quadratic.per_datum(u)
    single = [Quadratic(model, (inputs[n : n + 1], labels[n : n + 1]), likelihood, kind, l2=L2) for n in range(6)]
    assert_equal(actual.slopes, torch.stack([each.slope(u) for each in single]))
    assert_equal(actual.curvatures, torch.stack([each.curvature(u) for each in single]))
    assert_equal(actual.slope, quadratic.slope(u))
    assert_equal(actual.curvature, quadratic.curvature(u))


def test_derivatives_of_every_datum_are_those_of_the_spectrum():
    model, (inputs, labels), likelihood = example("cnn")
    ggn = GGN(model, inputs, labels, likelihood)
    _, basis = ggn.eigenpairs(2)
    theirs = ggn.directional_derivatives(basis)
    ours = Quadratic(model, (inputs, labels), likelihood).per_datum(testing.dense_basis(basis).mT)
    for name in ("slopes", "curvatures", "weights", "slope_snr", "curvature_snr"):
        assert_equal(getattr(ours, name), getattr(theirs, name))


def test_a_linear_model_has_no_second_derivatives_of_its_outputs():
    model = nn.Linear(3, 2).double()
    batch = (torch.randn(5, 3).double(), torch.randn(5, 2).double())
    ggn, hessian = (Quadratic(model, batch, "regression", kind) for kind in KINDS)
    u = vectors(8)
    assert_equal(hessian.matvec(u), ggn.matvec(u))
    assert_equal(hessian.per_datum(u).curvatures, ggn.per_datum(u).curvatures)


def test_an_indefinite_hessian_is_no_error():
    model, batch, likelihood = example("mlp")
    quadratic = Quadratic(model, batch, likelihood, "hessian")
    d = quadratic.n_params
    values, directions = quadratic.eigenpairs(d)
    assert float(values[-1]) < -1e-3
    assert_equal(quadratic.curvature(directions[-1]), values[-1])
    assert float(Quadratic(model, batch, likelihood, "ggn").curvature(directions[-1])) >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_some_parameters(kind):
    model, batch, likelihood = example("mlp")
    matrix = dense(model, batch, likelihood, kind)[-10:, -10:]
    for parameters in ("last_layer", ["2.*"], ["2.weight", "2.bias"]):
        quadratic = Quadratic(model, batch, likelihood, kind, l2=L2, parameters=parameters)
        expected = matrix + L2 * torch.eye(10).double()
        assert_equal(quadratic.matvec(torch.eye(10).double()), expected)
        assert_equal(quadratic.eigenpairs(2)[0], torch.linalg.eigvalsh(expected).flip(0)[:2])
        assert_equal(quadratic.center, torch.cat([model[2].weight.flatten(), model[2].bias]))
        assert_equal(quadratic.true_loss(quadratic.center), scalar(quadratic.loss))


class Buffered(nn.Module):
    """Dictionary inputs, a dropout, a normalisation with running statistics, and a buffer that counts the calls."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, batch):
        self.calls += 1  # in place
        return self.head(self.dropout(torch.tanh(self.norm(self.layer(batch["x"])) * batch["scale"])))


class Plain(nn.Module):
    """The same network for one tensor of inputs, and without writing."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        model = self.model
        return model.head(torch.tanh(model.norm(model.layer(x[:, :3])) * x[:, 3:]))


def test_the_model_is_left_as_it_was(device):
    model = Buffered().double().to(device).train()
    model.norm.eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    batch = {"x": torch.randn(5, 3).double(), "scale": torch.rand(5, 1).double(), "labels": torch.arange(5) % 2}
    state = torch.get_rng_state()
    for kind in KINDS:
        quadratic = Quadratic(model, batch, "classification", kind)
        u = vectors(quadratic.n_params).to(device)
        for method in (quadratic.matvec, quadratic.true_loss, quadratic.value, quadratic.per_datum):
            method(u)
        with torch.inference_mode():
            Quadratic(model, batch, "classification", kind).matvec(u * 1)
        if kind == "hessian":
            quadratic.eigenpairs(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    inputs = torch.cat([batch["x"], batch["scale"]], 1).to(device)
    plain = Plain(model.eval())
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    matrix = testing.dense_ggn(plain, inputs, weights, Categorical())
    assert_equal(Quadratic(model, batch, "classification").matvec(u), u @ matrix)


class Counting(nn.Module):
    """Its outputs depend on how often it was called."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.layer(x)) * self.calls


@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_starts_from_the_same_buffers(kind):
    model = Counting().double()
    quadratic = Quadratic(model, (torch.randn(4, 3).double(), torch.arange(4) % 2), "classification", kind)
    u = vectors(8)
    assert_equal(quadratic.matvec(u), quadratic.matvec(u))
    assert_equal(quadratic.true_loss(quadratic.center), scalar(quadratic.loss))
    assert float(model.calls) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_quadratic_stays_when_the_model_moves_on(kind):
    model, batch, likelihood = example("mlp")
    still, moved = (Quadratic(model, batch, likelihood, kind) for _ in range(2))
    u = vectors(still.n_params)
    expected = still.matvec(u), still.eigenpairs(3)[0], still.value(u), still.true_loss(u)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    actual = moved.matvec(u), moved.eigenpairs(3)[0], moved.value(u), moved.true_loss(u)
    for before, after in zip(expected, actual, strict=True):
        assert_equal(before, after)
    now = Quadratic(model, batch, likelihood, kind)
    assert float((now.matvec(u) - moved.matvec(u)).abs().max()) > 1e-3


class Fused(nn.Module):
    """The kernel of attention that has no second derivatives of its own."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("kind", KINDS)
def test_fused_attention(kind):
    model = Fused().double()
    batch = (torch.randn(4, 3, 4).double(), torch.arange(4) % 2)
    quadratic = Quadratic(model, batch, "classification", kind)
    matrix = dense(model, batch, Categorical(), kind)
    u = vectors(len(matrix))
    assert_equal(quadratic.matvec(u), u @ matrix)


class NoRule(nn.Module):
    """A large parameter that no layer rule covers."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(3000, 3) / 50), nn.Linear(3000, 2)

    def forward(self, x):
        return self.head(torch.tanh(torch.einsum("oi,ni->no", self.weight, x)))


def test_eigenpairs_of_a_layer_without_a_rule_come_from_products():
    model, batch = NoRule().double(), (torch.randn(3, 3).double(), torch.arange(3) % 2)
    values, directions = Quadratic(model, batch, "classification").eigenpairs(2)
    quadratic = Quadratic(model, batch, "classification")
    assert_equal(quadratic.matvec(directions), values[:, None] * directions)
    assert_equal(quadratic.curvature(directions), values)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision(kind, device):
    model, (inputs, labels), likelihood = example("cnn")
    u = vectors(sum(p.numel() for p in model.parameters()))
    exact = Quadratic(model, (inputs, labels), likelihood, kind)
    expected = exact.matvec(u), exact.eigenpairs(2)[0], exact.gradient
    single = Quadratic(copy.deepcopy(model).float().to(device), (inputs.float(), labels), likelihood, kind)
    actual = single.matvec(u), single.eigenpairs(2)[0], single.gradient
    for value, other in zip(actual, expected, strict=True):
        assert value.dtype == torch.float64
        assert_equal(value, other, 1e-4)


def test_bad_input():
    model, (inputs, labels), likelihood = example("mlp", n=3)
    batch = (inputs, labels)
    with pytest.raises(ValueError, match=r"a curvature out of \['ggn', 'hessian'\], got 'fisher'"):
        Quadratic(model, batch, likelihood, "fisher")
    with pytest.raises(ValueError, match="an l2 that is finite and at least zero, got -1"):
        Quadratic(model, batch, likelihood, l2=-1)
    with pytest.raises(ValueError, match="a batch with data, or a list of such batches, got none"):
        Quadratic(model, [], likelihood)
    with pytest.raises(ValueError, match="a batch with data"):
        Quadratic(model, (inputs[:0], labels[:0]), likelihood)
    with pytest.raises(ValueError, match="one target for each of the 3 inputs"):
        Quadratic(model, (inputs, labels[:2]), likelihood)
    with pytest.raises(ValueError, match="class indices from 0 to 1"):
        Quadratic(model, (inputs, labels + 5), likelihood)
    with pytest.raises(ValueError, match="matches none of"):
        Quadratic(model, batch, likelihood, parameters=["nothing"])
    with pytest.raises(NonFiniteError, match="a finite loss of the batch, got nan"):
        Quadratic(model, (inputs * torch.nan, labels), likelihood)
    with pytest.raises(NonFiniteError, match="a finite loss of the batch, got inf"):
        Quadratic(nn.Linear(3, 2).float(), (torch.full((3, 3), 1e30), torch.zeros(3, 2)), "regression")
    quadratic = Quadratic(model, batch, likelihood)
    with pytest.raises(ValueError, match=r"shape \[26\] or \[K, 26\], one entry for each parameter, got \(25,\)"):
        quadratic.matvec(torch.zeros(25))
    with pytest.raises(TypeError, match="a tensor of shape"):
        quadratic.slope([0.0])
    with pytest.raises(NonFiniteError, match="a product with the curvature"):
        quadratic.matvec(torch.full((26,), torch.inf))
    for k in (0, 27, 1.5, True):
        with pytest.raises(ValueError, match="a number of eigenvectors from 1 to 26"):
            quadratic.eigenpairs(k)


@pytest.mark.parametrize("gram", [True, False])
def test_a_batch_too_small_for_the_eigenvectors_asked_for(monkeypatch, gram):
    if not gram:
        monkeypatch.setattr(module, "GRAM_SIZE", 0)
    model, batch, likelihood = example("mlp", n=3)
    quadratic = Quadratic(model, batch, likelihood, l2=L2)
    assert len(quadratic.eigenpairs(3)[0]) == 3  # two classes: one vector for each datum
    with pytest.raises(ValueError, match=r"find 4 eigenvectors with curvature, got 3: .* of 3 data with 2 outputs"):
        Quadratic(model, batch, likelihood, l2=L2).eigenpairs(4)


def test_an_image_case_is_described():
    case = Case(lambda: nn.Linear(3, 2), (3,))
    text = repr(Quadratic(case.model(), (case.inputs(2), torch.tensor([0, 1])), "classification"))
    assert text.startswith("Quadratic(ggn, 2 data, 8 parameters, loss=")
