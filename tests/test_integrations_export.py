"""A fitted last layer as a plain module: torch.export, ONNX, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import debiased_laplace as dl
from debiased_laplace.integrations.export import CannotExportError, LastLayerPredictive
from tests.tolerances import FLOAT32, assert_equal

STRUCTURES = [dl.Kronecker(), dl.Diagonal(), dl.Full(), dl.LowRank(rank=5), dl.Isotropic()]


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def network(head: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3) if head is None else head).double()


def fitted(data, model: nn.Module | None = None, **settings) -> dl.Laplace:
    settings = {"parameters": "last_layer", "prior_precision": 2.0, **settings}
    return dl.fit(model or network(), [data], settings.pop("likelihood", "classification"), **settings)


def same_as_predict(posterior: dl.Laplace, x, module=None, **settings) -> None:
    """A module gives what the posterior predicts, exactly."""
    module = LastLayerPredictive(posterior, **settings) if module is None else module
    expected = posterior.predict(x, link=settings.get("link"), covariance=True)
    actual = module(**x) if isinstance(x, dict) else module(x)
    assert len(actual) >= 3
    for name, value in actual.items():
        assert_equal(value, getattr(expected, name))


@pytest.mark.parametrize("link", ["probit", "mean_field", "bridge", "bridge_norm"])
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: type(structure).__name__)
def test_a_module_predicts_as_the_posterior_does(data, structure, link):
    posterior = fitted(data, structure=structure)
    for covariance in (False, True):
        same_as_predict(posterior, data[0], link=link, covariance=covariance)


def test_it_has_the_link_and_the_temperature_of_the_tuned_posterior(data):
    x, y = data
    y = torch.where(torch.arange(60) % 4 == 0, (y + 1) % 3, y)  # not to be certain of
    posterior = fitted((x, y)).tune([(x, y)], link="probit")
    assert posterior.output_temperature != 1
    same_as_predict(posterior, x)


@pytest.mark.parametrize("likelihood", ["regression", "bernoulli", "poisson", "heteroscedastic"])
def test_it_predicts_other_targets(data, likelihood):
    x, _ = data
    targets = (x[:, 1:2] > 0).double() if likelihood == "heteroscedastic" else (x[:, 1:] > 0).double()
    noise = {"noise_variance": 0.3} if likelihood == "regression" else {}
    model = network(nn.Linear(6, 2)) if likelihood == "heteroscedastic" else network()
    same_as_predict(fitted((x, targets), model, likelihood=likelihood, **noise), x)


@pytest.mark.parametrize("structure", [dl.Kronecker(), dl.Full(), dl.LowRank(rank=5)], ids=lambda s: type(s).__name__)
def test_prior_precisions_of_weight_and_bias_may_differ(data, structure):
    prior = torch.cat([torch.full((18,), 2.0), torch.full((3,), 0.25)])
    same_as_predict(fitted(data, structure=structure, prior_precision=prior), data[0])


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3))

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weight


@pytest.mark.parametrize(
    ("head", "parameters"),
    [
        (nn.Linear(6, 3, bias=False), "last_layer"),
        (nn.Linear(6, 3), ["2.weight"]),
        (nn.Linear(6, 3), ["2.bias"]),
        (Product(), "last_layer"),
    ],
    ids=["without bias", "frozen bias", "bias alone", "product"],
)
def test_last_layers_of_every_form(data, head, parameters):
    same_as_predict(fitted(data, network(head), parameters=parameters), data[0])


def test_a_model_of_one_layer(data):
    torch.manual_seed(0)
    same_as_predict(fitted(data, nn.Linear(4, 3).double()), data[0])


def test_it_is_independent_of_the_model(data):
    model = network()
    posterior = fitted(data, model)
    module = LastLayerPredictive(posterior)
    before = module(data[0])["probabilities"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(module(data[0])["probabilities"], before)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again.variances.data_ptr() != module.variances.data_ptr()
        again.head.weight.data.zero_()
        again.variances.zero_()
        assert float(again(data[0])["logits_variance"].abs().max()) == 0
    assert torch.equal(module(data[0])["probabilities"], before)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()
    with pytest.warns(UserWarning, match="The posterior is about the network of the fit"):
        again = LastLayerPredictive(posterior)
    assert torch.equal(again(data[0])["probabilities"], before)


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: type(structure).__name__)
def test_it_moves_to_another_device_as_a_whole(data, structure):
    module = LastLayerPredictive(fitted(data, structure=structure)).to("meta")
    predictions = module(torch.empty(3, 4, device="meta", dtype=torch.float64))
    assert [value.device.type for value in predictions.values()] == ["meta"] * 3


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: type(structure).__name__)
def test_a_model_in_half_precision_is_predicted_in_single(data, structure):
    x, y = data
    posterior = fitted((x.bfloat16(), y), network().bfloat16(), structure=structure)
    actual, expected = LastLayerPredictive(posterior)(x.bfloat16()), posterior.predict(x.bfloat16())
    for name, value in actual.items():
        assert value.dtype == torch.float32
        assert_equal(value, getattr(expected, name), FLOAT32)


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: type(structure).__name__)
def test_torch_exports_it_for_any_number_of_data(data, structure):
    x, _ = data
    posterior = fitted(data, structure=structure)
    module = LastLayerPredictive(posterior, covariance=True)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for n in (2, 7, 60):
        same_as_predict(posterior, x[:n], program.module())


def test_a_module_of_keywords_is_exported(data):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    model = BertForSequenceClassification(config).double().eval()
    tokens = torch.randint(20, (12, 5))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    posterior = dl.fit(model, [{**inputs, "labels": torch.arange(12) % 3}], "classification", parameters="last_layer")
    same_as_predict(posterior, inputs)
    batch = {name: {0: torch.export.Dim("batch")} for name in inputs}
    program = torch.export.export(LastLayerPredictive(posterior), (), inputs, dynamic_shapes=batch)
    same_as_predict(posterior, {name: tensor[:5] for name, tensor in inputs.items()}, program.module())


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_onnx_has_it_for_any_number_of_data(data, likelihood):
    x, y = data
    x, targets = x.float(), y if likelihood == "classification" else x[:, 1:].float()
    posterior = fitted((x, targets), network().float(), likelihood=likelihood)
    module = LastLayerPredictive(posterior)
    names = list(module(x))
    program = torch.onnx.export(
        module, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["x"],
        output_names=names, verbose=False,
    )  # fmt: skip
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for n in (2, 7):
        expected = posterior.predict(x[:n])
        for name, value in zip(names, session.run(names, {"x": x[:n].numpy()}), strict=True):
            assert_equal(torch.from_numpy(value), getattr(expected, name), FLOAT32)


class Bent(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.tanh())


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 6), nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x).tanh(), self.weight)


@pytest.mark.parametrize(
    ("model", "settings", "arguments", "message"),
    [
        (
            network(),
            {"parameters": None},
            {},
            r"the one linear layer that makes the outputs, got one over \['0', '2'\]",
        ),
        (network(), {"separate_bias": True}, {}, "without separate_bias"),
        (nn.Sequential(network(), nn.LogSoftmax(1)), {}, {}, "outputs are those of its last layer as they are"),
        (network(Bent(6, 3)), {}, {}, "multiplies its input with its weight alone, got a Bent"),
        (Functional().double(), {}, {}, r"a module of its own, such as nn.Linear, got the parameters \['weight'\]"),
        (network(), {}, {"link": "mc"}, r"closed form .* got 'mc', .* Pass link= one of \['probit', "),
        (network(), {}, {"link": "logit"}, "Expected a link_approx out of"),
    ],
    ids=["all", "separate", "after", "bent", "functional", "draws", "unknown"],
)
def test_what_is_no_plain_module_is_refused(data, model, settings, arguments, message):
    with pytest.raises(ValueError, match=message):
        LastLayerPredictive(fitted(data, model, **settings), **arguments)


def test_dense_outputs_are_refused():
    torch.manual_seed(0)
    images, masks = torch.randn(8, 1, 4, 4), torch.randint(3, (8, 4, 4))
    posterior = dl.fit(nn.Conv2d(1, 3, 1), [(images, masks)], "classification", parameters="last_layer")
    with pytest.raises(CannotExportError, match="got dense ones, a distribution for every site"):
        LastLayerPredictive(posterior)


def test_a_table_of_outputs_is_refused():
    torch.manual_seed(0)
    index = torch.arange(40) % 5
    posterior = dl.fit(nn.Embedding(5, 3), [(index, index % 3)], "classification", parameters="last_layer")
    with pytest.raises(CannotExportError, match="got a Embedding that does something else"):
        LastLayerPredictive(posterior)
