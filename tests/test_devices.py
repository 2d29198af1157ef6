"""Tensors of every step are on the network's device, and nothing that is done chunk by chunk waits for it.

On a card that is not there (:mod:`tests.virtual_card`): the whole way from a model to predictions, with numbers that
have to be those of the CPU.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import debiased_laplace as dl
from debiased_laplace import DebiasedLaplace, _guards
from debiased_laplace._data import to_device
from tests.tolerances import assert_equal
from tests.virtual_card import CARD, ROOT, VirtualCard, per_chunk

#: Data in a batch and in a chunk.
SIZE = 4

#: Functions that may wait for the device in every chunk of data, and why.
IN_A_CHUNK = {
    "sampling/samplers:PrioritySampler.draw": "the draw is one of the CPU, which keeps the data",
    "network/factors:Factors.has_gradient": "whether there is padding decides what is computed: one answer for all",
    "curvature/indexed:_occurrences": "how many tokens have a gradient decides the shape of their Gram matrix",
    "likelihoods/_numerics:square_root": "eigenvectors of the outputs' covariance wait by themselves",
    "likelihoods/_numerics:negative_log_expectation": "Newton's steps to the mode of an integrand end when none moves",
    "posterior/dense_validation:SiteValidation.chosen": "which sites have a target is looked at on the CPU",
}

#: Functions of searches, which wait in every step. How many steps there are is no matter of how many data there are.
IN_A_SEARCH = ("posterior/search:", "posterior/temperature:temperature_scaling", "posterior/gaussian:Posterior.__post_")


class Padded(nn.Module):
    """A Transformer of token sequences that are padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(self.embedding(x), src_key_padding_mask=x == 0)
        kept = (x != 0)[..., None].to(hidden)
        return self.head((hidden * kept).sum(1) / kept.sum(1))


class Scaled(nn.Module):
    """Layer norm, a parameter that no layer rule covers, and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.layer(x)) * self.scale))


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3),
    )  # fmt: skip


def segmentation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def images(n: int) -> Tensor:
    return torch.randn(n, 1, 6, 6)


def rows(n: int) -> Tensor:
    return torch.randn(n, 3)


def tokens(n: int) -> Tensor:
    x = torch.randint(1, 7, (n, 5))
    return x.masked_fill(torch.arange(5) >= torch.randint(2, 6, (n, 1)), 0)


def classes(n: int) -> Tensor:
    return torch.randint(3, (n,))


def numbers(n: int) -> Tensor:
    return torch.randn(n, 3)


@dataclass
class Case:
    build: Callable[[], nn.Module]
    data: Callable[[int], Tensor]
    targets: Callable[[int], Tensor] = classes
    likelihood: Any = "classification"
    fit: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, Any] = field(default_factory=dict)
    predict: dict[str, Any] = field(default_factory=dict)

    def loader(self, n: int) -> tuple[nn.Module, Tensor, list[tuple[Tensor, Tensor]]]:
        torch.manual_seed(0)
        model, x, y = self.build().double().eval(), self.data(n), self.targets(n)
        x, y = (t.double() if t.is_floating_point() else t for t in (x, y))
        return model, x, list(zip(x.split(SIZE), y.split(SIZE), strict=True))

    def run(self, model: nn.Module, x: Tensor, loader: Any, card: VirtualCard | None) -> tuple[Tensor, list[Counter]]:
        """What is predicted after fit and tuning; what waited in each step."""
        waits = []

        def done() -> None:
            if card is not None:
                waits.append(card.waits.copy())
                card.waits.clear()

        done()
        posterior = dl.fit(model, loader, self.likelihood, chunk_size=SIZE, **self.fit)
        done()
        grid = {"prior_precisions": torch.tensor([0.5, 2.0])} | self.tune
        posterior = posterior.tune(**grid) if "val_loader" in grid else posterior.tune(loader, **grid)
        done()
        predicted = posterior.predict(x, **self.predict)
        done()
        assert card is None or card.holds(predicted.mean)
        return predicted.mean.cpu(), waits[1:]


UNIFORM = dl.UniformSampler(None)
CASES = {
    "lenet-kronecker": Case(lenet, images, tune={"temperature": True}),
    "lenet-isotropic": Case(lenet, images, fit={"structure": dl.Isotropic(), "sampler": UNIFORM}),
    "lenet-reduce": Case(lenet, images, fit={"structure": dl.Kronecker(sharing=dl.Reduce())}),
    "lenet-marginal-likelihood": Case(lenet, images, numbers, "regression", tune={"val_loader": None}),
    "transformer-kronecker": Case(Padded, tokens, numbers, "regression", fit={"mc_samples": 1}),
    "transformer-low-rank": Case(
        Padded, tokens, fit={"structure": dl.LowRank(rank=4), "sampler": UNIFORM, "split": dl.TwoBatch()},
    ),
    "transformer-full-of-some": Case(
        Padded, tokens, fit={"structure": dl.Full(), "parameters": ["head*", "embedding*"], "sampler": UNIFORM}
    ),
    "mlp-diagonal-fisher": Case(
        Scaled, rows, predict={"method": "linearized", "n_samples": 5},
        fit={"structure": dl.Diagonal(), "curvature": "empirical_fisher", "sampler": dl.UniformSampler(7)},
    ),
    "mlp-kronecker-layerwise": Case(
        Scaled, rows, tune={"prior_structure": "layerwise", "link": "probit"}, predict={"covariance": True}
    ),
    "mlp-last-layer": Case(
        mlp, rows, fit={"parameters": "last_layer", "estimator": "factored"}, tune={"link": "mc", "n_samples": 4},
        predict={"method": "nn", "n_samples": 5},
    ),
    "mlp-bernoulli": Case(mlp, rows, lambda n: torch.rand(n, 3).round(), "bernoulli", fit={"sampler": UNIFORM}),
    "mlp-poisson": Case(mlp, rows, lambda n: torch.randint(4, (n, 3)).double(), dl.Poisson(), fit={"sampler": UNIFORM}),
    "pixels-kronecker": Case(
        segmentation, images, lambda n: torch.randint(3, (n, 6, 6)), fit={"mc_samples": 1}, predict={"n_samples": 5}
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # tiny networks that were not trained
@pytest.mark.parametrize("name", CASES)
def test_a_card_gives_the_numbers_of_the_cpu_and_no_chunk_waits_for_it(name: str) -> None:
    case, steps = CASES[name], []
    for n in (2 * SIZE, 4 * SIZE):
        model, x, loader = case.loader(n)
        expected, _ = case.run(model, x, loader, None)
        with VirtualCard() as card:
            actual, waits = case.run(copy.deepcopy(model).to(CARD), x, loader, card)
        steps.append(waits)
        assert_equal(actual, expected)
    for step, few, many in zip(("fit", "tune", "predict"), *steps, strict=True):
        allowed = (*IN_A_CHUNK, *(IN_A_SEARCH if step == "tune" else ()))
        new = {function for function in per_chunk(few, many) if not function.startswith(allowed)}
        assert not new, f"{step} waits for the device in every chunk of data, in {sorted(new)}"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank"])
def test_the_drop_in_class_gives_on_a_card_the_numbers_of_the_cpu(structure: str) -> None:
    model, x, loader = Case(mlp, rows).loader(2 * SIZE)

    def everything(of: nn.Module) -> list[Tensor]:
        la = DebiasedLaplace(of, "classification", hessian_structure=structure)
        la.fit(loader)
        found = [la.log_marginal_likelihood(), la(x)]
        la.optimize_prior_precision(method="marglik")
        found += [la.prior_precision, la(x, link_approx="bridge")]
        la.optimize_prior_precision(method="gridsearch", val_loader=loader, grid_size=3)
        found += [la(x), la.functional_variance(torch.ones(1, 3, la.n_params, dtype=x.dtype).to(la.prior_precision))]
        if structure == "diag":  # elsewhere the signs of directions, and with them single samples, are arbitrary
            found += [la(x, pred_type="nn", link_approx="mc", n_samples=4), la.functional_samples(x, n_samples=3)]
            found += [la.predictive_samples(x, n_samples=3), la.sample(2)]
        return found

    expected = everything(model)
    with VirtualCard():
        actual = [value.cpu() for value in everything(copy.deepcopy(model).to(CARD))]
    for one, other in zip(actual, expected, strict=True):
        assert_equal(one, other)


def test_the_virtual_card_refuses_what_a_card_refuses_and_counts_what_waits() -> None:
    with VirtualCard() as card:
        there, here = torch.arange(3.0, device=CARD), torch.arange(3.0)
        with pytest.raises(RuntimeError, match=r"same device: aten\.add\.Tensor"):
            there + here
        with pytest.raises(RuntimeError, match=r"same device: aten\.stack"):
            torch.stack([there[0], here[0]])
        with pytest.raises(RuntimeError, match=r"same device: aten\.index"):
            here[there.long()]
        with pytest.raises(RuntimeError, match="device type for generator"):
            torch.rand(2, device=CARD, generator=torch.Generator())
        with pytest.raises(TypeError, match="to numpy"):
            there.numpy()
        assert not card.waits
        assert {t.device for t in (there + here[1], there[here.long()], there.new_zeros(2), there.double())} == {CARD}
        assert not card.waits
        leaf = here.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((leaf.to(CARD) * there)[:2].sum(), leaf)
        assert gradient.device == torch.device("cpu")
        card.waits.clear()
        float(there[0]), bool(there.any()), there.tolist(), there.cpu(), there[there > 1], there.nonzero()
        assert sum(card.waits.values()) == 6
        assert there.cpu().device == torch.device("cpu")


def test_functions_that_may_wait_are_there() -> None:
    for name in IN_A_CHUNK:
        module, function = name.split(":")
        assert f"def {function.split('.')[-1]}(" in (ROOT / module).with_suffix(".py").read_text(), name


def test_inputs_are_copied_to_the_device_without_waiting() -> None:
    inputs = {"x": torch.randn(3, 2), "mask": torch.ones(3, 2)}
    with VirtualCard() as card:
        moved = to_device(inputs, CARD)
        assert all(card.holds(part) for part in moved.values())
        assert card.uploads and not card.blocking
        to_device(moved, torch.device("cpu"))
        assert card.blocking == {"_data/batches:to_device.<locals>.move"}  # the CPU would read before it is there


# -- layouts and precisions -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_images_with_their_channels_last_stay_so_and_give_the_same_numbers() -> None:
    seen: list[bool] = []

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 2), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return self.head(self.second(torch.relu(self.first(x))).mean((2, 3)))

    torch.manual_seed(0)
    model, x, y = Looking().double(), torch.randn(12, 3, 5, 5, dtype=torch.float64), torch.randint(3, (12,))

    def predicted(format: torch.memory_format) -> list[Tensor]:
        images = x.to(memory_format=format)
        loader = list(zip(images.split(4), y.split(4), strict=True))
        posterior = dl.fit(model.to(memory_format=format), loader, "classification", sampler=dl.PrioritySampler(8))
        return [posterior.posterior.curvatures, posterior.predict(images).outputs_variance]

    expected = predicted(torch.contiguous_format)
    seen.clear()
    actual = predicted(torch.channels_last)
    assert seen and all(seen)
    for one, other in zip(actual, expected, strict=True):
        assert_equal(one, other)


class InBfloat16(nn.Module):
    """A model that runs in mixed precision by itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("build, data", [(mlp, rows), (lenet, images), (Padded, tokens)])
def test_models_in_mixed_precision_have_statistics_in_single_precision(build: Any, data: Any) -> None:
    torch.manual_seed(0)
    model, x, y = InBfloat16(build().eval()), data(16), classes(16)
    assert model(x).dtype == torch.bfloat16
    posterior = dl.fit(model, [(x, y)], "classification")
    plain = dl.fit(model.inner, [(x, y)], "classification")
    predicted = posterior.predict(x)
    assert {posterior.posterior.curvatures.dtype, predicted.mean.dtype, predicted.outputs_variance.dtype} == {
        torch.float32
    }
    assert {a.dtype for a in posterior.fitted.observed.statistics.totals} == {torch.float32}
    ratio = predicted.outputs_variance.sum() / plain.predict(x).outputs_variance.sum()
    assert abs(float(ratio) - 1) < 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("drop_in", [False, True])
def test_a_region_of_mixed_precision_around_a_fit_changes_no_number(drop_in: bool) -> None:
    torch.manual_seed(0)
    model, x, y = lenet().eval(), images(16), classes(16)

    def everything() -> list[Tensor]:
        if drop_in:
            la = DebiasedLaplace(model, "classification", hessian_structure="kron")
            la.fit([(x, y)])
            la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], grid_size=3)
            return [la.posterior.curvatures, la.prior_precision, la(x), la.predictive_samples(x, n_samples=3)]
        posterior = dl.fit(model, [(x, y)], "classification").tune([(x, y)], prior_precisions=torch.tensor([0.5, 2.0]))
        samples = posterior.predict(x, method="linearized", n_samples=3)
        return [
            posterior.posterior.curvatures,
            posterior.posterior.prior_precision,
            posterior.predict(x).mean,
            samples.mean,
        ]

    expected = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = everything()
        assert torch.is_autocast_enabled("cpu")
        assert (x.flatten(1) @ x.flatten(1).mT).dtype == torch.bfloat16
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


class PrecisionOfProducts(TorchDispatchMode):
    """Notes with which precision products are formed, in forward passes of a model and elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.in_forward, self.seen = False, {False: set(), True: set()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in {"mm", "bmm", "addmm", "addmm_", "baddbmm", "convolution_backward", "convolution"}:
            self.seen[self.in_forward].add((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def given_back() -> Iterator[None]:
    """Leave the settings of this process as they were."""
    with _guards.full_precision():
        pass
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_products_of_statistics_are_in_full_precision_whatever_the_user_allows(allowed: str, given_back: None) -> None:
    mode = PrecisionOfProducts()

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = lenet().eval()

        def forward(self, x: Tensor) -> Tensor:
            mode.in_forward = True
            try:
                return self.inner(x)
            finally:
                mode.in_forward = False

    torch.manual_seed(0)
    model, x, y = Looking().eval(), images(8), classes(8)
    torch.set_float32_matmul_precision(allowed)
    torch.backends.cudnn.allow_tf32 = True
    with mode:
        posterior = dl.fit(model, [(x, y)], "classification", sampler=dl.UniformSampler(None))
        posterior = posterior.tune([(x, y)], prior_precisions=torch.tensor([0.5, 2.0]))
        posterior.predict(x)
        la = DebiasedLaplace(model, "classification")
        la.fit([(x, y)])
        la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)], grid_size=2)
        la(x)
        with pytest.raises(ValueError, match="Expected a link"):
            posterior.predict(x, link="none")
    full = {("highest", False)}
    assert mode.seen[False] == full
    assert mode.seen[True] - full == {(allowed, True)}  # the user's, but for derivatives in forward mode and the like
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (allowed, True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_products_of_quadratics_are_in_full_precision(curvature: str, given_back: None) -> None:
    torch.manual_seed(0)
    model, x, y, other = lenet().eval(), images(8), classes(8), (images(6), classes(6))
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    mode = PrecisionOfProducts()
    with mode, torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        batch = dl.Quadratic(model, (x, y), "classification", curvature)
        _, rows = batch.eigenpairs(2)
        for quadratic in (batch, dl.Quadratic(model, other, "classification", curvature)):
            quadratic.slope(rows), quadratic.curvature(rows), quadratic.projected(rows), quadratic.matvec(rows[0])
            quadratic.true_loss(quadratic.center + rows[0]), quadratic.per_datum(rows[0]), quadratic.gradient_rounding()
        ggn = dl.GGN(model, x, y, "classification")
        derivatives = ggn.directional_derivatives(ggn.eigenpairs(2)[1])
        ggn.inverse_matvec(ggn.matvec(rows), 1.0), ggn.trace
    full = {("highest", False)}
    assert mode.seen[False] == full
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    assert derivatives.curvatures.dtype == torch.float64


class Rounding(nn.Module):
    """A deep network whose products are rounded as a card rounds them while that is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(32, 32) for _ in range(12)), nn.Linear(32, 3)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(x)
            if torch.backends.cudnn.allow_tf32:
                large = hidden.detach() * (2**13 + 1)
                hidden = hidden + (large - (large - hidden.detach()) - hidden.detach())  # to eleven bits
            x = hidden.relu()
        return self.head(x)


def test_kinks_are_where_full_precision_has_them(given_back: None) -> None:
    """Rectifiers that rounding puts on their other side change a gradient by percents."""
    torch.manual_seed(0)
    model, x, y = Rounding(), torch.randn(64, 32), classes(64)
    results = []
    for allowed in (True, False):
        torch.backends.cudnn.allow_tf32 = allowed
        results.append(dl.fit(model, [(x, y)], "classification", sampler=dl.UniformSampler(None)))
    assert not results[0].network.lone_blocks
    assert_equal(*(result.posterior.curvatures for result in results), 0.0)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="since torch 2.9")
def test_newer_settings_of_precision_are_given_back(given_back: None) -> None:
    owners = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul]
    before = [owner.fp32_precision for owner in owners]
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # older settings refuse to be read from here on
    users = [owner.fp32_precision for owner in owners]
    try:
        with _guards.full_precision(), _guards.full_precision():
            assert {owner.fp32_precision for owner in owners} == {"ieee"}
            with _guards.users_precision():
                assert [owner.fp32_precision for owner in owners] == users
            assert {owner.fp32_precision for owner in owners} == {"ieee"}
        assert [owner.fp32_precision for owner in owners] == users
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.fp32_precision = value
