"""Adapters and partly frozen networks: exact variances, nothing kept of what is frozen, a base of lower precision."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, IA3Config, LoKrConfig, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import debiased_laplace as dl
from debiased_laplace.network.discovery import close
from debiased_laplace.network.memory import HeldMemory, of_a_datum
from debiased_laplace.network.network import Network
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.testing import dense_posterior_precision
from tests.tolerances import FLOAT32, assert_equal

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 12}
TEXT: dict[str, Any] = {"vocab_size": 20, "num_labels": 3, "pad_token_id": 0}


class Logits(nn.Module):
    """A Hugging Face classifier as a function of one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(**{"pixel_values" if x.is_floating_point() else "input_ids": x}).logits


def llama() -> nn.Module:
    return LlamaForSequenceClassification(LlamaConfig(**SMALL, **TEXT, num_key_value_heads=1))


def gpt2() -> nn.Module:
    return GPT2ForSequenceClassification(GPT2Config(**TEXT, n_embd=8, n_layer=2, n_head=2, n_positions=16))


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SMALL, **TEXT, max_position_embeddings=16))


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**SMALL, num_labels=3, image_size=8, patch_size=4, num_channels=1))


def lora(*modules: str, **settings: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(modules), **{"task_type": "SEQ_CLS", **settings})


ADAPTERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "linear": (llama, lora("q_proj", "down_proj")),
    "conv1d": (gpt2, lora("c_attn", fan_in_fan_out=True)),
    "embedding": (bert, lora("word_embeddings", "query", bias="all")),
    "positions": (gpt2, lora("wpe", "wte")),
    "patches": (vit, lora("projection", "q_proj", task_type=None, modules_to_save=["classifier"])),
    "dora": (llama, lora("q_proj", use_dora=True)),
    "dora-conv1d": (gpt2, lora("c_attn", use_dora=True, fan_in_fan_out=True)),
    "dora-embedding": (bert, lora("word_embeddings", use_dora=True)),
    "ia3": (bert, IA3Config(task_type="SEQ_CLS")),
    "prompt": (gpt2, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "lokr": (llama, LoKrConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])),
    "vera": (llama, VeraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])),
    "adalora": (llama, AdaLoraConfig(task_type="SEQ_CLS", init_r=2, total_step=9, target_modules=["q_proj"])),
}


def adapted(name: str, base: torch.dtype = torch.float64) -> nn.Module:
    """A model with adapters that have been trained, those of a base in half precision in single precision."""
    build, config = ADAPTERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(build().to(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                dtype = base if base == torch.float64 else parameter.dtype
                parameter.data = (parameter.data + 0.3 * torch.randn_like(parameter)).to(dtype)
    return Logits(model).eval()


def inputs(name: str, n: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ADAPTERS[name][0] is vit:
        return torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(1, 20, (n, 6), generator=generator)


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """By as many backward passes as there are numbers, ``[N, C, D]``: some adapters are no functions of torch.func."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    rows = [
        torch.autograd.grad(output, trainable, retain_graph=True, materialize_grads=True)
        for datum in x.split(1) for output in model(datum)[0]
    ]  # fmt: skip
    return torch.stack([torch.cat([g.double().flatten() for g in row]) for row in rows]).unflatten(0, (len(x), -1))


def assert_exact(posterior: Any, model: nn.Module, x: Tensor, tolerance: float) -> Tensor:
    """Variances of the outputs are those of autograd's Jacobians and the posterior's covariance; returns them."""
    jacobians = jacobian(model, x)
    precision = dense_posterior_precision(posterior.posterior)
    expected = torch.einsum("ncd,nkd->nck", torch.linalg.solve(precision, jacobians.mT).mT, jacobians)
    _, variances = functional_moments(posterior.network, posterior.posterior, x)
    assert_equal(variances.double(), expected, tolerance)
    return variances


def fitted(name: str, model: nn.Module, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    return dl.fit(model, [(inputs(name, 8, dtype=dtype), torch.arange(8) % 3)], "classification", **settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_variances_of_adapters_are_exact_and_the_model_untouched(name, tmp_path):
    model = adapted(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    posterior = fitted(name, model)
    x = inputs(name, 3, 5)
    variances = assert_exact(posterior, model, x, 1e-8)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    posterior.save(tmp_path / "posterior.pt")
    loaded = dl.load(tmp_path / "posterior.pt", model)
    assert_equal(functional_moments(loaded.network, loaded.posterior, x)[1], variances)


@pytest.mark.parametrize("name", ["dora", "dora-conv1d", "dora-embedding"])
def test_what_is_made_of_a_frozen_weight_in_the_forward_pass_is_constant(name):
    """DoRA divides by the norms of a sum: of a frozen weight, or a parameter newly made of it, and LoRA's."""
    assert not Network.discover(adapted(name), inputs(name, 3)).lone_blocks


@pytest.mark.filterwarnings("ignore")
def test_adapters_are_named_by_a_pattern():
    """The head is trainable too, and left out."""
    model = adapted("linear")
    network = fitted("linear", model, parameters=["*lora_*"]).network
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert list(network.shapes) == [name for name in trainable if "lora_" in name] != trainable


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["linear", "conv1d", "embedding", "patches", "ia3"])
def test_adapters_in_single_precision_over_a_base_in_half_precision(name):
    model, pattern = adapted(name, torch.bfloat16), "*ia3_*" if name == "ia3" else "*lora_*"
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert torch.float32 in dtypes and {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    posterior = fitted(name, model, torch.bfloat16, parameters=pattern)
    model.requires_grad_(False)
    for parameter, shape in posterior.network.shapes.items():
        assert model.get_parameter(parameter).requires_grad_().shape == shape
        assert model.get_parameter(parameter).dtype == torch.float32
    assert (posterior.network.dtype, posterior.network.precision) == (torch.float32, torch.finfo(torch.bfloat16).eps)
    assert posterior.posterior.curvatures.dtype in (torch.float32, torch.float64)
    assert_exact(posterior, model, inputs(name, 3, 5, torch.bfloat16), FLOAT32)
    single = Network.discover(adapted(name), inputs(name, 3), parameters=pattern)
    assert posterior.network.blocks == single.blocks  # nothing is taken for misread because of its rounding


def test_outputs_are_compared_at_the_precision_of_the_base():
    """Rounding to half precision in every layer adds up to some units in the last place of the outputs."""
    half, single = torch.finfo(torch.bfloat16).eps, torch.finfo(torch.float32).eps
    outputs = torch.linspace(-1, 1, 7)[:, None]
    assert close(outputs + 4 * half, outputs, outputs, half) and not close(outputs + 4 * half, outputs, outputs, single)
    assert not close(outputs + 0.1, outputs, outputs, half)


# -- nothing of what is frozen is kept -------------------------------------------------------------


def layers() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Tanh(), nn.ConvTranspose1d(4, 4, 2), nn.Flatten(),
        nn.LayerNorm(20), nn.Linear(20, 3),
    ).double()  # fmt: skip


def test_a_layer_with_a_frozen_weight_keeps_no_input():
    """Nor does a normalisation of which the shift alone is trainable; variances are exact."""
    model = layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    x = torch.randn(6, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    posterior = dl.fit(model, [(x, torch.arange(6) % 3)], "classification")
    assert_exact(posterior, model, x, 1e-8)
    calls = posterior.network.factors(x).calls
    assert len(calls) == 5
    assert all(call.input.is_meta for call in calls)


def test_what_a_frozen_layer_was_given_is_free_again():
    """Inputs of layers with a frozen weight and a trainable bias, and what parameters are added to."""
    seen: list[weakref.ref[Any]] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.positions = nn.Parameter(torch.randn(5, 4))
            self.linear.weight.requires_grad_(False)
            self.head.weight.requires_grad_(False)

        def noted(self, x: Tensor) -> Tensor:
            seen.append(weakref.ref(x.untyped_storage()))
            return x

        def forward(self, x: Tensor) -> Tensor:
            x = self.noted(2 * x) + self.positions
            x = self.linear(self.noted(x + 1))
            return self.head(self.noted(x.mean(1)))

    network = Network.discover(Watched(), torch.randn(3, 5, 4))
    seen.clear()
    factors = network.factors(torch.randn(3, 5, 4))
    gc.collect()
    assert len(factors.calls) == 3
    assert [reference() is None for reference in seen] == [True] * 3


def test_constants_of_a_frozen_body_exist_one_at_a_time():
    """Weights that are made layer by layer, as those of quantised models are."""
    alive: list[int] = []
    made: list[weakref.ref[Any]] = []

    class Dequantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randint(-8, 8, (6, 4, 4), dtype=torch.int8))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            for codes in self.codes:
                weight = codes.to(x.dtype) / 8
                made.append(weakref.ref(weight.untyped_storage()))
                x = torch.tanh(F.linear(x, weight))
                del weight
                alive.append(sum(reference() is not None for reference in made))
            return self.head(x)

    network = Network.discover(Dequantised(), torch.randn(3, 4))
    alive.clear()
    made.clear()
    network.factors(torch.randn(3, 4))
    assert alive == [0] * 6


# -- chunks ----------------------------------------------------------------------------------------


def wide(width: int) -> nn.Module:
    """A frozen body whose intermediate results are large, and a small head."""
    body = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4)).requires_grad_(False)
    return nn.Sequential(body, nn.Linear(4, 2))


def test_chunks_are_bounded_by_what_the_frozen_body_needs():
    """While tanh is computed, two results of the width exist for every datum, and the copy of the input."""
    network = Network.discover(wide(1000), torch.randn(8, 4))
    assert network.forward_memory == 4 * (2 * 1000 + 4)
    assert math.isclose(network.chunk_size(2**20, 1), 2**20 / network.forward_memory, rel_tol=0.05)
    restored = Network.restore(wide(1000), network.description())
    assert restored.chunk_size(2**20, 1) == network.chunk_size(2**20, 1)


def test_held_memory_is_what_exists():
    """What is saved for a backward pass does, views are nothing more; what does not grow with the data is left out."""
    weight = torch.randn(10, 10, requires_grad=True)

    def held(n: int) -> list[int]:
        x = torch.randn(n, 10)
        with HeldMemory() as memory:
            product = x @ (2 * weight)
            hidden = product.tanh()
            del product
            total = hidden.T.sum()
            del hidden
            total.neg()
        return memory.held

    # The doubled weight; the product beside it; that and its tanh; that alone; the sum beside it; its negative too.
    assert list(dict.fromkeys(held(3))) == [400, 400 + 120, 240, 120, 124, 128]
    assert of_a_datum(held(3), held(2), 3) == 80
    assert of_a_datum([5, 9, 4], [4, 6, 4], 3) == 3
    assert of_a_datum([6, 9], [6], 3) == 3
