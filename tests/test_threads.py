"""Calls in several threads at once: each is right, and nobody sees the model other than it is."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debiased_laplace import DebiasedLaplace
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.network.forward_mode import forward_mode
from debiased_laplace.quadratic.quadratic import Quadratic
from tests.tolerances import assert_equal

N_THREADS = 4
KINDS = ("glm", "nn", "linearized")
X = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(2, (40,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _often_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Meeting(nn.Module):
    """Threads wait here for one another, while there is somebody to wait for."""

    barrier: threading.Barrier | None = None
    keeps = False

    def forward(self, x: Tensor) -> Tensor:
        if Meeting.barrier is not None:
            Meeting.barrier.wait(30)
        return x


class Network(nn.Module):
    """Fails for inputs of 7; may keep what it computes in itself and read it again, as many networks do."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.keeps = keeps
        self.first, self.norm, self.drop = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.meeting, self.last = Meeting(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = self.drop(self.norm(torch.tanh(self.first(x))))
        if self.keeps:
            self.features = features
        self.meeting(x)
        if float(x.max()) == 7.0:
            raise ArithmeticError("an input of 7")
        return self.last(self.features if self.keeps else features)


@pytest.fixture(params=[False, True], ids=["", "keeps"], autouse=True)
def _keeps(request: pytest.FixtureRequest) -> None:
    Meeting.keeps = request.param


def made() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Network(Meeting.keeps).double()
        model(torch.randn(50, 3).double())
    return model  # in training mode


def fitted(model: nn.Module, subset: str = "all", structure: str = "kron") -> DebiasedLaplace:
    la = DebiasedLaplace(model, "classification", subset, structure)
    la.fit([(X, Y)])
    return la


def together(*work: Callable[[], Any]) -> list[Any]:
    """Results of functions that start at once, each in a thread; an exception is its result."""
    found: list[Any] = [None] * len(work)
    start = threading.Barrier(len(work))

    def run(index: int) -> None:
        start.wait(30)
        try:
            found[index] = work[index]()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def state(model: nn.Module) -> Any:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, id(t), t._version, t.requires_grad, t.tolist()) for name, t in tensors],
        [(module.training, set(module.__dict__)) for module in model.modules()],
    )


def watched(model: nn.Module, stop: threading.Event) -> Callable[[], int]:
    """Looks at a model until it is told to stop; counts when it was other than at first."""
    before = state(model)

    def watch() -> int:
        wrong = 0
        while not stop.is_set():
            wrong += state(model) != before
        return wrong

    return watch


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_threads_inside_the_forward_pass_at_once(kind: str, subset: str) -> None:
    model = made()
    la = fitted(model, subset)
    inputs = [X[i : i + 5] for i in range(N_THREADS)]
    expected = [la(x, pred_type=kind, n_samples=3) for x in inputs]
    stop = threading.Event()
    watch = watched(model, stop)
    Meeting.barrier = threading.Barrier(N_THREADS)
    try:

        def all_of_them() -> list[Any]:
            try:
                return together(*[lambda x=x: la(x, pred_type=kind, n_samples=3) for x in inputs])
            finally:
                stop.set()

        found, wrong = together(all_of_them, watch)
    finally:
        Meeting.barrier = None
    for own, right in zip(found, expected, strict=True):
        assert isinstance(own, Tensor), own
        assert_equal(own, right, 1e-14)
    assert wrong == 0


@pytest.mark.parametrize("structure", ["kron", "lowrank", "diag", "full"])
def test_free_races_of_every_kind_of_prediction(structure: str) -> None:
    model = made()
    la = fitted(model, structure=structure)
    calls: list[Callable[[], Any]] = [
        lambda: la(X[:3]),
        lambda: la(X[3:5], pred_type="nn", n_samples=4),
        lambda: la(X[3:5], pred_type="nn", n_samples=7),
        lambda: la(X[:2], pred_type="linearized", n_samples=3),
        lambda: la(X[5:9], pred_type="linearized", n_samples=5),
        lambda: la(X[:4], link_approx="mc"),
        lambda: la(X[:4], link_approx="bridge"),
        lambda: la.log_marginal_likelihood()[None],
        lambda: la.functional_samples(X[:2], "nn", 3, generator=torch.Generator().manual_seed(0)),
        lambda: Quadratic(model, (X, Y), Categorical()).gradient,
        lambda: Quadratic(model, (X, Y), Categorical(), "hessian").eigenpairs(1)[0],
    ]
    expected, stop = [call() for call in calls], threading.Event()
    watch = watched(model, stop)

    def several(offset: int) -> int:
        wrong = 0
        for turn in range(3 * len(calls)):
            index = (turn * (offset + 1) + offset) % len(calls)
            wrong += not torch.allclose(calls[index](), expected[index], rtol=1e-9, atol=1e-12)
        return wrong

    def all_of_them() -> list[Any]:
        try:
            return together(*[lambda offset=offset: several(offset) for offset in range(N_THREADS)])
        finally:
            stop.set()

    found, wrong = together(all_of_them, watch)
    assert found == [0] * N_THREADS
    assert wrong == 0


def test_a_fit_beside_predictions() -> None:
    model = made()
    la, other = fitted(model), fitted(model, "last_layer", "full")
    expected, expected_other, stop = la(X[:4]), other(X[:4]), threading.Event()
    watch = watched(model, stop)

    def predict() -> int:
        return sum(not torch.equal(la(X[:4]), expected) for _ in range(40))

    def fit_again() -> int:
        return sum(not torch.equal(fitted(model, "last_layer", "full")(X[:4]), expected_other) for _ in range(4))

    def all_of_them() -> list[Any]:
        try:
            return together(predict, fit_again, predict, fit_again)
        finally:
            stop.set()

    assert together(all_of_them, watch) == [[0, 0, 0, 0], 0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_the_middle_of_another_call(kind: str) -> None:
    model = made()
    la = fitted(model)
    before, expected = state(model), la(X[:4], pred_type=kind, n_samples=3)
    bad = torch.full((2, 3), 7.0, dtype=torch.float64)

    def fails() -> list[str]:
        caught = []
        for _ in range(10):
            try:
                la(bad, pred_type=kind, n_samples=3)
            except ArithmeticError as error:
                caught.append(str(error))
        return caught

    def works() -> int:
        return sum(not torch.allclose(la(X[:4], pred_type=kind, n_samples=3), expected, rtol=1e-12) for _ in range(20))

    found = together(fails, works, fails, works)
    assert [found[0], found[2]] == [["an input of 7"] * 10] * 2
    assert [found[1], found[3]] == [0, 0]
    assert state(model) == before
    assert_equal(la(X[:4], pred_type=kind, n_samples=3), expected, 1e-14)


@pytest.mark.filterwarnings("ignore::debiased_laplace.network.snapshot.ModelChangedWarning")
def test_training_goes_on_in_the_main_thread() -> None:
    model = made()
    la = fitted(model)
    expected = {kind: la(X[:4], pred_type=kind, n_samples=3) for kind in KINDS}
    stop = threading.Event()

    def serve() -> int:
        wrong, n = 0, 0
        while not stop.is_set() or n < 3:
            for kind in KINDS:
                own = la(X[:4], pred_type=kind, n_samples=3)
                wrong += not torch.allclose(own, expected[kind], rtol=1e-12)
            n += 1
        return wrong

    def train() -> list[Tensor]:
        try:
            return trained(model)
        finally:
            stop.set()

    found = together(train, serve, serve)
    assert found[1:] == [0, 0]
    alone = made()
    for mine, own in zip(found[0], trained(alone), strict=True):  # and training is as if nobody had served
        assert torch.equal(mine, own)
    assert state(model)[1] == state(alone)[1]


def trained(model: nn.Module) -> list[Tensor]:
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    model.drop.p = 0.0  # its draws are those of the process
    for _ in range(30):
        optimiser.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimiser.step()
        time.sleep(0.001)
    return [p.detach().clone() for p in [*model.parameters(), *model.buffers()]]


def test_one_level_of_forward_mode_for_all_threads() -> None:
    """The first to leave does not take the tangents of the others away."""
    inside, left = threading.Event(), threading.Event()

    def first() -> None:
        with forward_mode():
            inside.set()
        left.set()

    def second() -> float:
        with forward_mode():
            dual = torch.autograd.forward_ad.make_dual(torch.ones(()), torch.full((), 3.0))
            threading.Thread(target=first).start()
            assert left.wait(30)
            return float(torch.autograd.forward_ad.unpack_dual(dual * 2).tangent)

    assert together(second) == [6.0]
    assert inside.is_set()
    with torch.autograd.forward_ad.dual_level():  # the level is free again
        pass


def test_what_attention_may_use_is_left_alone() -> None:
    """Which kernels are allowed is a setting of the process, and a call that changes it changes it for all threads."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Unflatten(1, (1, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(),
        nn.Linear(4, 2),
    ).double()  # fmt: skip
    la = fitted(model)
    seen = set()

    def look(module: nn.Module, args: Any, output: Any) -> None:
        seen.add((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()))

    model[0].register_forward_hook(look)
    la = fitted(model)
    together(*[lambda: la(X[:2], pred_type="linearized", n_samples=2)] * N_THREADS)
    Quadratic(model, (X, Y), Categorical(), "hessian").eigenpairs(1)
    assert seen == {(True, True)}
