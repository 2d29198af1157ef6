"""The user's model is never written to, and a posterior is about what it was at the fit, whatever comes later."""

import copy
import functools
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

from debiased_laplace import DebiasedLaplace
from debiased_laplace._checks import UnsupportedLayerError
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.network import snapshot
from debiased_laplace.network.network import Network
from debiased_laplace.network.snapshot import ModelChangedError, ModelChangedWarning, Snapshot, in_evaluation_mode
from debiased_laplace.quadratic.quadratic import Quadratic
from tests.networks import ZOO
from tests.tolerances import assert_equal

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(2, (24,), generator=torch.Generator().manual_seed(2))
KINDS = ("glm", "nn", "linearized")


# -- models that refer to their own parts ---------------------------------------------------------


class Helper:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def run(self, x: Tensor) -> Tensor:
        return self.model.last(torch.tanh(self.model.first(x)))


class SelfReferring(nn.Module):
    """Every way to get at one's own layers other than by their names."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        both = [self.first, self.last]
        self.run: Any = {
            "bound method": lambda: self._forward,
            "closure": lambda: lambda x: both[1](torch.tanh(both[0](x))),
            "default": lambda: lambda x, f=self.first, g=self.last: g(torch.tanh(f(x))),
            "partial": lambda: functools.partial(_apply, self.first, last=self.last),
            "object": lambda: Helper(self).run,
            "weak": lambda: functools.partial(_apply_weak, weakref.ref(self)),
        }.get(way, lambda: None)()
        self.held: Any = {
            "list": lambda: [self.first, (nn.Tanh(), self.last)],
            "dictionary": lambda: {"first": self.first, "rest": {"last": self.last}},
        }.get(way, lambda: None)()
        if way == "parent":
            object.__setattr__(self.first, "parent", self)

    def _forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.run is not None:
            return self.run(x)
        if isinstance(self.held, list):
            return self.held[1][1](self.held[1][0](self.held[0](x)))
        if isinstance(self.held, dict):
            return self.held["rest"]["last"](torch.tanh(self.held["first"](x)))
        return self.first.parent.last(torch.tanh(self.first(x)))


def _apply(first: nn.Module, x: Tensor, *, last: nn.Module) -> Tensor:
    return last(torch.tanh(first(x)))


def _apply_weak(model: Any, x: Tensor) -> Tensor:
    return model()._forward(x)


class Remembering(nn.Module):
    """Leaves traces of every call in itself, and reads them within the call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("n_calls", torch.zeros((), dtype=torch.int64))
        self.number, self.history, self.scale = 0, [], torch.ones(1, dtype=torch.float64)
        self.features: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.tanh(self.first(x))
        self.number += 1
        self.history.append(len(x))
        self.n_calls += 1
        self.scale.mul_(1.5)
        return self.last(self.features) * (1 if self.number == 1 and len(self.history) == 1 else torch.nan)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def normalised() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))
    model(torch.randn(30, 3))
    return model.train()


def old_weight_norm() -> nn.Module:
    model = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0])
    return model


def compiled_in_place() -> nn.Module:
    model = plain()
    model.compile()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{way: functools.partial(SelfReferring, way) for way in (
        "bound method", "closure", "default", "partial", "object", "weak", "list", "dictionary", "parent"
    )},
    "plain": plain,
    "remembering": Remembering,
    "normalised": normalised,
    "old weight norm": old_weight_norm,
    "compiled": lambda: torch.compile(plain()),
    "compiled part": lambda: nn.Sequential(torch.compile(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
    "compiled in place": compiled_in_place,
    "data parallel": lambda: nn.DataParallel(plain()),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)
    ),
    "attention": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.Unflatten(1, (1, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(),
        nn.Linear(4, 2),
    ),
}  # fmt: skip


def made(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name]().double()


def fitted(model: nn.Module, subset: str = "all", structure: str = "full", **keywords: Any) -> DebiasedLaplace:
    la = DebiasedLaplace(model, "classification", subset, structure, **keywords)
    la.fit([(X, Y)])
    return la


def everything(model: nn.Module) -> dict[str, Any]:
    """All that is in a model: attributes by identity, tensors by value."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            found[f"{name}/{key}"] = (id(value), dict(value) if isinstance(value, dict) else None)
            if isinstance(value, list):
                found[f"{name}/{key}/length"] = len(value)
            if isinstance(value, Tensor):
                found[f"{name}/{key}/value"] = value.clone().tolist()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.grad)
        found[f"{name}/value"] = tensor.tolist()
    return found


def use(la: DebiasedLaplace) -> None:
    for kind in KINDS:
        la(X[:3], pred_type=kind, n_samples=3)
        la.functional_samples(X[:2], kind, 2)
    la.predictive_samples(X[:2])
    for link in ("mc", "bridge", "mean_field"):
        la(X[:3], link_approx=link)
    la.log_marginal_likelihood()
    la.optimize_prior_precision()
    la.optimize_prior_precision(method="gridsearch", val_loader=[(X, Y)], grid_size=3)
    la.state_dict()
    la.coverage()


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_of_a_model_is_written(name: str, subset: str) -> None:
    model = made(name)
    model.first_mode = next(model.modules()).training
    before = everything(model)
    la = fitted(model, subset)
    use(la)
    assert everything(model) == before


@pytest.mark.parametrize("name", [name for name in MODELS if name != "remembering"])
def test_predictions_are_those_of_the_model_itself(name: str) -> None:
    """Against Jacobians of the user's own modules, put into evaluation mode by hand."""
    model = made(name)
    la = fitted(model)
    _, variance = la._glm_predictive_distribution(X[:4])
    model.eval()
    own = getattr(model, "_orig_mod", model.module if name == "data parallel" else model)
    jacobians = _jacobian(own, X[:4])
    assert_equal(variance, jacobians @ torch.linalg.inv(la.posterior_precision) @ jacobians.mT)
    with torch.no_grad():
        assert_equal(la.network.outputs(X[:4]), own(X[:4].to(la.network.device)))


def _jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Row by row, without any function of this package or of torch.func."""
    parameters = list(model.parameters())
    outputs = model(x.to(parameters[0].device))
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(outputs[n, c], parameters, retain_graph=True)])
        for n in range(len(x)) for c in range(outputs.shape[1])
    ]  # fmt: skip
    return torch.stack(rows).unflatten(0, outputs.shape)


def test_every_call_sees_the_model_of_the_fit() -> None:
    """What a forward pass leaves in a module is not there in the next: this model's outputs are NaN in its second."""
    model = made("remembering")
    la = fitted(model)
    first = la(X[:4])
    assert bool(first.isfinite().all())
    assert_equal(la(X[:4]), first)
    assert (model.number, model.history, int(model.n_calls), float(model.scale)) == (0, [], 0, 1.0)


def test_backward_hooks_are_about_training_and_forward_hooks_are_not() -> None:
    model, seen = made("plain"), []
    expected = _jacobian(model, X[:4])
    model[0].register_full_backward_hook(lambda module, inputs, outputs: (10 * inputs[0],))
    model[2].register_full_backward_pre_hook(lambda module, outputs: (5 * outputs[0],))
    model[1].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    la = fitted(model)
    _, variance = la._glm_predictive_distribution(X[:4])
    assert_equal(variance, expected @ torch.linalg.inv(la.posterior_precision) @ expected.mT)
    assert seen
    model[2].register_forward_hook(lambda module, args, output: 3 * output)
    _, variance = fitted(model)._glm_predictive_distribution(X[:4])
    thrice = 3 * expected
    assert_equal(variance, thrice @ torch.linalg.inv(fitted(model).posterior_precision) @ thrice.mT)


def test_tensors_of_a_copy_share_what_they_should() -> None:
    model = ZOO["tied-weights"].model()
    own = Snapshot(model)
    shared = {p.data_ptr() for p in model.parameters()}
    assert not shared & {p.data_ptr() for p in own.module.parameters()}
    assert len(list(own.module.parameters())) == len(list(model.parameters()))
    light = in_evaluation_mode(model.train())
    assert shared == {p.data_ptr() for p in light.parameters()}
    assert model.training and not light.training


def test_a_model_that_another_thread_goes_on_changing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = made("plain"), Snapshot._copy

    def copied(self: Snapshot, *args: Any) -> None:
        original(self, *args)
        with torch.no_grad():
            model[0].weight.add_(1)

    monkeypatch.setattr(Snapshot, "_copy", copied)
    with pytest.raises(RuntimeError, match="another thread changes again and again"):
        Snapshot(model)


# -- changes after a fit ---------------------------------------------------------------------------


def _train(model: nn.Module, optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.SGD) -> None:
    own = optimiser(model.parameters(), lr=0.1)
    F.cross_entropy(model(X), Y).backward()
    own.step()


def _average(model: nn.Module) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    _train(model)
    averaged.update_parameters(model)
    model.load_state_dict(averaged.module.state_dict())


def _write(model: nn.Module, how: Callable[[Tensor], Any]) -> None:
    with torch.no_grad():
        how(next(p for p in model.parameters() if p.requires_grad))


def _to_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector + 1, model.parameters())


def _set(model: nn.Module, name: str, value: Any) -> None:
    setattr(model, name, value)


TOLD: dict[str, Callable[[nn.Module], Any]] = {
    "a step of SGD": _train,
    "a step of Adam": lambda model: _train(model, torch.optim.Adam),
    "a fused step": lambda model: _train(model, functools.partial(torch.optim.Adam, foreach=True)),
    "averaged weights": _average,
    "zeros": lambda model: _write(model, nn.init.zeros_),
    "copied into": lambda model: _write(model, lambda p: p.copy_(p + 1)),
    "one entry": lambda model: _write(model, lambda p: p.view(-1)[3].add_(1e-6)),
    "data in place": lambda model: [p.data.add_(0.1) for p in model.parameters()],
    "data replaced": lambda model: [_set(p, "data", p.data + 0.1) for p in model.parameters()],
    "numpy": lambda model: model[0].weight.detach().numpy().__iadd__(1),
    "vector_to_parameters": _to_vector,
    "load_state_dict": lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
    "load_state_dict(assign)": lambda model: model.load_state_dict(
        {k: v + 1 for k, v in model.state_dict().items()}, assign=True
    ),
    "a new parameter": lambda model: _set(model[0], "weight", nn.Parameter(torch.randn(4, 3).double())),
    "a new layer": lambda model: model.__setitem__(2, nn.Linear(4, 2).double()),
    "reset_parameters": lambda model: model[0].reset_parameters(),
    "pruned": lambda model: nn.utils.prune.l1_unstructured(model[0], "weight", amount=0.5),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model[0]),
    "another activation": lambda model: model.__setitem__(1, nn.ReLU()),
    "a further parameter": lambda model: model.register_parameter("extra", nn.Parameter(torch.zeros(1))),
    "a further layer": lambda model: model.append(nn.Linear(2, 2).double()),
    "a layer taken away": lambda model: model.__delitem__(2),
    "running statistics": lambda model: model.register_buffer("running_mean", torch.ones(1)),
}
REFUSED: dict[str, Callable[[nn.Module], Any]] = {
    "float": lambda model: model.float(),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to(dtype)": lambda model: model.to(torch.float32),
    "to(device)": lambda model: model.to("meta"),
    "another shape": lambda model: _set(model[2], "weight", nn.Parameter(torch.randn(3, 4).double())),
}
NO_DIFFERENCE: dict[str, Callable[[nn.Module], Any]] = {
    "frozen": lambda model: model.requires_grad_(False),
    "one frozen": lambda model: model[0].weight.requires_grad_(False),
    "train": lambda model: model.train(),
    "eval": lambda model: model.eval(),
    "gradients": lambda model: F.cross_entropy(model(X), Y).backward(),
    "zero_grad": lambda model: model.zero_grad(),
    "a hook that looks on": lambda model: model[0].register_forward_hook(lambda module, args, output: None),
    "a copy": copy.deepcopy,
    "double": lambda model: model.double(),
    "the same weights again": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "written and restored": lambda model: _write(model, lambda p: (p.add_(1), p.copy_(_BEFORE[0]))),
    "compiled": lambda model: model.compile(),
    "attributes": lambda model: _set(model, "name", "mine"),
}
_BEFORE: list[Tensor] = []


def predictions(la: DebiasedLaplace) -> list[Tensor]:
    return [la(X[:3], pred_type=kind, n_samples=4) for kind in KINDS] + [la.posterior.mean]


def changing(structure: str, subset: str = "all") -> tuple[nn.Module, DebiasedLaplace, list[Tensor]]:
    model = made("plain")
    _BEFORE[:] = [model[0].weight.detach().clone()]
    la = fitted(model, subset, structure)
    return model, la, predictions(la)


@pytest.mark.parametrize("structure", ["kron", "lowrank", "diag", "full", "last_layer"])
@pytest.mark.parametrize("change", TOLD)
def test_a_changed_model_is_told_and_the_posterior_stays_that_of_the_fit(change: str, structure: str) -> None:
    last = structure == "last_layer"
    model, la, before = changing("kron" if last else structure, "last_layer" if last else "all")
    jacobians, precision = _jacobian(copy.deepcopy(model), X[:3]), la.posterior.covariance_matvec
    TOLD[change](model)
    for kind, expected in zip(KINDS, before, strict=False):
        with pytest.warns(ModelChangedWarning, match=r"as it was at the fit.*Call fit again"):
            assert_equal(la(X[:3], pred_type=kind, n_samples=4), expected, 1e-15)
    with pytest.warns(ModelChangedWarning, match=r"load_state_dict\(la\.network\.snapshot\.state\(\)\)"):
        _, variance = la.functional_samples(X[:2]), la._glm_predictive_distribution(X[:3])[1]
    if not last:
        rows = jacobians.flatten(0, 1)
        dense = (rows @ precision(rows).mT).unflatten(0, (3, 2)).unflatten(2, (3, 2))
        assert_equal(variance, torch.stack([dense[n, :, n] for n in range(3)]))
    for tune in (
        lambda: la.log_marginal_likelihood(),
        lambda: la.optimize_prior_precision(),
        lambda: la.optimize_prior_precision(method="gridsearch", val_loader=[(X, Y)], grid_size=3),
        lambda: la.state_dict(),
    ):
        with pytest.warns(ModelChangedWarning):
            tune()


@pytest.mark.parametrize("structure", ["kron", "lowrank", "diag", "full"])
@pytest.mark.parametrize("change", REFUSED)
def test_a_model_of_another_dtype_or_device_is_refused(change: str, structure: str) -> None:
    model, la, _ = changing(structure)
    REFUSED[change](model)
    for kind in KINDS:
        with pytest.raises(ModelChangedError, match=r"another dtype, device or shape.*Move the model back"):
            la(X[:3], pred_type=kind)
    for tune in (la.optimize_prior_precision, la.log_marginal_likelihood, la.state_dict):
        with pytest.raises(ModelChangedError, match="call fit again"):
            tune()


@pytest.mark.parametrize("structure", ["kron", "lowrank", "diag", "full"])
@pytest.mark.parametrize("change", NO_DIFFERENCE)
def test_what_makes_no_difference(change: str, structure: str, tmp_path: Any) -> None:
    model, la, before = changing(structure)
    NO_DIFFERENCE[change](model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ModelChangedWarning)
        for mine, expected in zip(predictions(la), before, strict=True):
            assert_equal(mine, expected, 1e-15)
        la.log_marginal_likelihood()
        la.save(tmp_path / "la")
    again = DebiasedLaplace.load(tmp_path / "la", model)
    for mine, expected in zip(predictions(again), before, strict=True):
        assert_equal(mine, expected, 1e-15)


FROZEN_USES: dict[str, Callable[[DebiasedLaplace, Any], Any]] = {
    **{kind: lambda la, _, kind=kind: la(X[:2], pred_type=kind) for kind in KINDS},
    **{f"samples {kind}": lambda la, _, kind=kind: la.functional_samples(X[:2], kind, 2) for kind in KINDS},
    **{link: lambda la, _, link=link: la(X[:2], link_approx=link) for link in ("probit", "mc", "bridge", "mean_field")},
    "sample": lambda la, _: la.sample(2),
    "marginal likelihood": lambda la, _: la.log_marginal_likelihood(),
    "marglik": lambda la, _: la.optimize_prior_precision(),
    "marglik layerwise": lambda la, _: la.optimize_prior_precision(prior_structure="layerwise"),
    "gridsearch": lambda la, _: la.optimize_prior_precision(method="gridsearch", val_loader=[(X, Y)], grid_size=3),
    "coverage": lambda la, _: la.coverage(),
    "precision": lambda la, _: la.posterior_precision,
    "prior": lambda la, _: setattr(la, "prior_precision", 3.0),
    "state": lambda la, _: la.load_state_dict(la.state_dict()),
    "save": lambda la, path: la.save(path / "la"),
    "load": lambda la, path: (la.save(path / "la"), DebiasedLaplace.load(path / "la", la.model)(X[:2])),
    "deepcopy": lambda la, _: copy.deepcopy(la)(X[:2]),
    "pickle": lambda la, _: pickle.loads(pickle.dumps(la))(X[:2]),
    "torch.save": lambda la, _: torch.save(la, io.BytesIO()),
    "fit again": lambda la, _: la.fit([(X, Y)]),
    "fit further": lambda la, _: la.fit([(X, Y)], override=False),
    "backprop": lambda la, _: (setattr(la, "enable_backprop", True), la(X[:2])),
    "samples of all": lambda la, _: la.predictive_samples(X[:2], n_samples=2),
}


@pytest.mark.parametrize("subset", ["all", "last_layer", "subnetwork"])
@pytest.mark.parametrize("name", FROZEN_USES)
@pytest.mark.filterwarnings("ignore:The (best|model|marginal|Validation):UserWarning")
def test_every_use_of_a_model_that_was_frozen_for_serving(name: str, subset: str, tmp_path: Any) -> None:
    model = made("plain")
    la = fitted(model, subset, "kron", **({"params": ["0.*", "2.bias"]} if subset == "subnetwork" else {}))
    expected, mean = FROZEN_USES[name](copy.deepcopy(la), tmp_path), la.mean.clone()
    model.requires_grad_(False)
    found = FROZEN_USES[name](la, tmp_path)
    assert not any(p.requires_grad for p in model.parameters())
    if isinstance(found, Tensor):
        assert_equal(found, expected, 1e-12)
    assert_equal(la.mean, mean, 1e-15)
    assert la.n_params == sum(p.numel() for p in la.params)


def test_a_saved_posterior_is_that_of_the_fit(tmp_path: Any) -> None:
    model, la, before = changing("kron")
    _train(model)
    with pytest.warns(ModelChangedWarning):
        la.save(tmp_path / "la")
    with pytest.raises(ValueError, match="weights"):
        DebiasedLaplace.load(tmp_path / "la", model)
    model.load_state_dict(la.network.snapshot.state())
    again = DebiasedLaplace.load(tmp_path / "la", model)
    for mine, expected in zip(predictions(again), before, strict=True):
        assert_equal(mine, expected, 1e-15)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda la: pickle.loads(pickle.dumps(la))], ids=["copy", "pickle"])
def test_a_copy_of_a_posterior_whose_model_has_changed(copied: Any) -> None:
    model, la, before = changing("kron")
    _train(model)
    twin = copied(la)
    assert twin.model is not model
    with pytest.warns(ModelChangedWarning):
        found = predictions(twin)
    for mine, expected in zip(found, before, strict=True):
        assert_equal(mine, expected, 1e-15)
    twin.model.load_state_dict(twin.network.snapshot.state())
    with warnings.catch_warnings():
        warnings.simplefilter("error", ModelChangedWarning)
        predictions(twin)


@pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank"])
def test_a_copy_after_tuning_by_gradients(structure: str) -> None:
    """As laplace-torch's own loops tune: what the object holds then is no leaf of the graph."""
    la = fitted(made("plain"), structure=structure)
    logarithm = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (-la.log_marginal_likelihood(logarithm.exp())).backward()
    twin = copy.deepcopy(la)
    assert_equal(twin(X[:3]), la(X[:3]), 1e-15)
    assert not twin.prior_precision.requires_grad
    assert la.prior_precision.requires_grad
    assert_equal(pickle.loads(pickle.dumps(la))(X[:3]), la(X[:3]), 1e-15)


def test_large_frozen_weights_are_shared_and_a_change_of_them_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "SHARED", 64)
    model = made("plain")
    model[0].requires_grad_(False)
    la = fitted(model)
    before = la(X[:3])
    assert la.network.snapshot.parameters["0.weight"].data_ptr() == model[0].weight.data_ptr()
    assert la.network.snapshot.parameters["2.weight"].data_ptr() != model[2].weight.data_ptr()
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.warns(ModelChangedWarning):
        assert_equal(la(X[:3]), before, 1e-15)
    kept = model[0].weight.detach().clone()
    for change in (lambda: model[0].weight.data.add_(1), lambda: model[0].weight.detach().add_(1)):
        change()
        with pytest.raises(ModelChangedError, match=r"'0\.weight' were overwritten.*Fit again, or load them"):
            la(X[:3])
        model[0].weight = nn.Parameter(kept.clone(), requires_grad=False)
        la = fitted(model)
    model[0].weight.data = model[0].weight.data + 1  # elsewhere in memory: those of the fit are still there
    with pytest.warns(ModelChangedWarning):
        la(X[:3])


def test_scripted_and_traced_models_are_told_what_they_are() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted, traced = torch.jit.script(made("plain")), torch.jit.trace(made("plain"), X[:2])
        body = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Dropout())), nn.Linear(4, 2)).double()
    for model in (scripted, traced):
        for subset in ("all", "last_layer"):
            with pytest.raises(UnsupportedLayerError, match=r"got the modules .* scripted or traced \(torch\.jit\)"):
                fitted(model, subset)
    with pytest.raises(UnsupportedLayerError, match=r"\['0\.0'\] scripted or traced.*requires_grad_\(False\)"):
        fitted(body)
    la = fitted(body, "last_layer")  # its layers need not be seen
    with torch.no_grad():
        expected = body[1](body[0][0](X[:3]))  # without the dropout
    assert_equal(la.network.outputs(X[:3]), expected)
    assert body[0].training
    for p in body[0].parameters():
        p.requires_grad_(False)
    fitted(body)


def test_a_quadratic_is_of_the_weights_it_was_made_with() -> None:
    model = made("normalised")
    quadratic = Quadratic(model, (X, Y), Categorical())
    vector = torch.linspace(-1, 1, quadratic.n_params, dtype=torch.float64)
    expected = quadratic.matvec(vector), quadratic.true_loss(quadratic.center)
    _train(model)
    model(X)  # other running statistics
    assert_equal(quadratic.matvec(vector), expected[0], 1e-15)
    assert_equal(quadratic.true_loss(quadratic.center), expected[1], 1e-15)
    again = Quadratic(quadratic._network.snapshot, (X, Y), Categorical())
    assert_equal(quadratic.eigenpairs(2)[0], again.eigenpairs(2)[0])


def test_networks_of_a_model_that_was_trained_on_do_not_share_passes() -> None:
    model = made("plain")
    first, second = Network.discover(model, X), Network.discover(model, X)
    assert first.same_blocks(second)
    _train(model)
    assert not first.same_blocks(Network.discover(model, X))
    assert not first.same_blocks(Network.discover(copy.deepcopy(model), X))


def test_a_snapshot_is_let_go() -> None:
    la = fitted(made("plain"))
    kept = weakref.ref(la.network.snapshot.module[0].weight)
    del la
    gc.collect()
    assert kept() is None


class Distances(nn.Module):
    """Centres of classes: the batched derivatives of cdist are wrong in some releases of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(2, 4))

    def forward(self, h: Tensor) -> Tensor:
        return -torch.cdist(h, self.centres).square()


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)),
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Distances()),
        lambda: nn.Sequential(nn.Unflatten(1, (3, 1)), nn.LSTM(1, 2, batch_first=True), Last(), nn.Linear(2, 2)),
        lambda: nn.Sequential(nn.Unflatten(1, (3, 1)), nn.GRU(1, 2, batch_first=True), Last()),
    ],
    ids=["prelu", "cdist", "lstm", "gru"],
)
def test_parameters_that_torch_func_gets_wrong_or_not_at_all(build: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double()
    la = fitted(model)
    jacobians = _jacobian(model, X[:4])
    assert_equal(
        la._glm_predictive_distribution(X[:4])[1], jacobians @ torch.linalg.inv(la.posterior_precision) @ jacobians.mT
    )
    again = copy.deepcopy(la)
    assert_equal(again(X[:4]), la(X[:4]), 1e-15)


class Last(nn.Module):
    def forward(self, both: Any) -> Tensor:
        return both[0][:, -1]
