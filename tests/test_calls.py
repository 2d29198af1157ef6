"""How models are called, what is taken of what they return, and adapters; models as other packages make them.

Rows of the table in ``docs/batches.md`` are in ``tests/test_batches.py``.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import debiased_laplace as dl
from debiased_laplace import Diagonal, Full, Kronecker, Single, _data, _store
from debiased_laplace._data.calling import CallingConvention, Forward, logits_of
from debiased_laplace.evaluation.predictors.baselines import outputs_of
from debiased_laplace.quadratic.quadratic import Quadratic
from debiased_laplace.testing import dense_posterior_precision
from tests.documented import DOCS, code_of, executed
from tests.tolerances import assert_equal

A = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
B = torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
#: Networks here are not trained.
QUIET = pytest.mark.filterwarnings(
    "ignore:The best prior precision:UserWarning", "ignore:Validation data do not:UserWarning"
)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(a) + self.b(b)))


class Returning(nn.Module):
    """The same with something else for its outputs, of one input."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.two, self.write = Two(), write

    def forward(self, x: Any) -> Any:
        return self.write(self.two(x[:, :3], x[:, 3:]))


X = torch.cat([A, B], 1)


def exact(posterior: dl.Laplace, model: nn.Module, call: Callable[[dict[str, Tensor]], Tensor], x: Any) -> None:
    """Predictions are those of Jacobians of the model, called by hand, and of the dense posterior."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if name in posterior.network.shapes}
    model.eval()
    jacobians = torch.func.jacrev(call)(parameters)
    jacobian = torch.cat([value.flatten(2) for value in jacobians.values()], -1)
    covariance = jacobian @ dense_posterior_precision(posterior.posterior).inverse() @ jacobian.mT
    predicted = posterior.predict(x, covariance=True)
    assert_equal(predicted.outputs_mean, call(parameters))
    assert_equal(predicted.outputs_covariance, covariance)


# -- what is given ------------------------------------------------------------------------------------


def of(forward: Callable[..., Any], inner: nn.Module | None = None) -> nn.Module:
    module = type("Module", (nn.Module,), {"forward": forward})()
    if inner is not None:
        module.inner = inner
    return module


FORWARDS: dict[str, tuple[nn.Module, Any, Any]] = {
    "two": (of(lambda self, a, b: 0), (A, B), ("a", "b")),
    "a mask that need not be": (of(lambda self, x, mask=None: 0), (A, B), ("a", "b")),
    "a switch is no data": (of(lambda self, batch, flag=False, scale=1.0: 0), (A, B), "whole"),
    "two of three": (of(lambda self, a, b, c=None: 0), [A, B], ("a", "b")),
    "one of a tuple": (of(lambda self, a, b=None: 0), (A,), "whole"),
    "all optional": (of(lambda self, a=None, b=None, flag=True: 0), (A, B), ("a", "b")),
    "a scripted module": (torch.jit.script(Two()), (A, B), ("a", "b")),
    "names": (of(lambda self, a, b: 0), {"b": B, "a": A, "labels": LABELS}, {"a", "b"}),
    "names for one": (of(lambda self, a: 0), {"a": A, "labels": LABELS}, {"a"}),
    "a batch": (of(lambda self, batch: 0), {"a": A, "labels": LABELS}, "whole"),
    "a batch that need not be": (of(lambda self, batch=None: 0), {"a": A}, "whole"),
    "a batch and more": (of(lambda self, batch, b=None, **more: 0), {"a": A, "b": B}, "whole"),
    "a batch by position": (of(lambda self, a, /: 0), {"a": A}, "whole"),
    "any names": (of(lambda self, **named: 0), {"a": A, "b": B, "labels": LABELS}, {"a", "b"}),
    "one and any": (of(lambda self, a, **named: 0), {"a": A, "b": B, "labels": LABELS}, {"a", "b"}),
    "any positions": (of(lambda self, *several: 0), {"a": A}, "whole"),
    "by name alone": (of(lambda self, *, a, b=None: 0), {"a": A, "other": B}, {"a"}),
    "handed on twice": (
        of(lambda self, *args, **kwargs: 0, of(lambda self, *args, **kwargs: 0, Two())), {"a": A, "b": B, "c": B},
        {"a", "b"},
    ),
    "handed on to nobody": (of(lambda self, *args, **kwargs: 0), {"a": A, "c": B}, {"a", "c"}),
    "no hand-on": (of(lambda self, *several: 0, nn.Linear(3, 2)), (A, B), ("a", "b")),
    "an object": (of(lambda self, a, b=None: 0), SimpleNamespace(a=A), "whole"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARDS)
def test_what_a_forward_takes_decides(name):
    module, inputs, expected = FORWARDS[name]
    positional, named = CallingConvention().arguments(Forward.of(module), inputs)
    if expected == "whole":
        assert positional[0] is inputs
        assert (len(positional), named) == (1, {})
    elif isinstance(expected, set):
        assert (positional, set(named)) == ((), expected)
        assert all(named[key] is inputs[key] for key in named)
    else:
        assert named == {}
        assert [value is given for value, given in zip(positional, inputs, strict=True)] == [True] * len(expected)


REFUSED: dict[str, tuple[Any, str]] = {
    "three for two": ((A, B, B, LABELS), r"2 inputs for the model's forward\(a, b\), got a tuple of 3.*inputs_of="),
    "one for two": ((A, LABELS), r"missing 1 required.*The Tensor went to it as one argument of its forward\(a, b\)"),
    "a key is missing": ({"a": A, "labels": LABELS}, r"entries for \['b'\].*forward\(a, b\) needs.*'labels' are the t"),
    "other keys": ({"x": A, "y": B, "labels": LABELS}, r"entries for \['a', 'b'\].*the keys \['x', 'y', 'labels'\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_given_is_an_error_that_says_what_to_pass(name):
    batch, match = REFUSED[name]
    with pytest.raises(TypeError, match=match):
        dl.fit(Two(), [batch], "classification")
    optional = of(lambda self, a=None, b=None: a)
    with pytest.raises(TypeError, match=r"entries that the model's forward\(a, b\) takes, got the keys \['x'\]\. Name"):
        CallingConvention()(optional, {"x": A})


def test_inputs_of_different_lengths_and_targets_of_another_number():
    with pytest.raises(ValueError, match=r"shapes \[\(8, 3\), \(5, 2\)\]\. Put the batch dimension first"):
        dl.fit(Two(), [(A, B[:5], LABELS)], "classification")
    with pytest.raises(ValueError, match=r"one target for each of the 8 inputs .*got targets of shape \(5,\)"):
        dl.fit(Two(), [(A, B, LABELS[:5])], "classification")


@pytest.mark.parametrize("error", [KeyError("z"), AttributeError("size"), TypeError("not a dict")])
def test_a_model_that_fails_for_a_whole_batch_is_told_apart(error):
    def forward(self: nn.Module, batch: Any) -> Tensor:
        raise error

    with pytest.raises(TypeError, match=r"own forward pass failed.*dict with the keys \['a'\].*forward\(batch\)"):
        CallingConvention()(of(forward), {"a": A})
    with pytest.raises(type(error)) as raised:
        CallingConvention()(of(forward), A)
    assert raised.value is error


def test_entries_that_are_left_out_are_named_once(caplog):
    batch = {"a": A, "b": B, "idx": LABELS, "text": list("abcdefgh"), "labels": LABELS}
    with caplog.at_level(logging.WARNING, "debiased_laplace"):
        posterior = dl.fit(Two(), [batch, batch], "classification", structure=Diagonal())
        posterior.predict(batch)
    assert [r.getMessage() for r in caplog.records if "no arguments" in r.getMessage()] == [
        "The model's forward has no arguments 'idx', 'text': these entries of the batches are left out. Name them like "
        "its arguments, or use inputs_of=, if it needs them."
    ]


@pytest.mark.parametrize("structure", [Full(), Kronecker()])
def test_every_way_in_gives_the_same_posterior(structure):
    """Also for what else reads batches: quadratics, baselines of the evaluation, the last layer."""
    model, parameters = Two(), ["a", "c"]
    ways = {
        "three": (A, B, LABELS), "a pair": ([A, B], LABELS), "a dictionary": {"b": B, "a": A, "labels": LABELS},
    }  # fmt: skip
    asked = {"three": (A, B), "a pair": [A, B], "a dictionary": {"labels": LABELS, "a": A, "b": B}}
    call = lambda p: torch.func.functional_call(model, p, (A, B))  # noqa: E731
    for name, batch in ways.items():
        for chosen in (None, parameters, "last_layer"):
            posterior = dl.fit(model, [batch], "classification", structure=structure, parameters=chosen, split=Single())
            exact(posterior, model, call, asked[name])
        loss = F.cross_entropy(model(A, B), LABELS)
        assert_equal(torch.tensor(Quadratic(model, batch, "classification").loss, dtype=torch.float64), loss.double())
        assert_equal(outputs_of(model, [batch])[0], model(A, B))


# -- what is returned ---------------------------------------------------------------------------------


class Named(NamedTuple):
    loss: Any
    scores: Any


def test_logits_are_taken_and_nothing_else():
    y = A[:, :2]
    for returned in (y, (y, None), [y], SimpleNamespace(logits=y), {"logits": y, "loss": 0}):
        assert logits_of(returned) is y
    for returned, match in (
        ({"out": y}, r"got dict with the keys \['out'\]\. Pass outputs_of="),
        (SimpleNamespace(last_hidden_state=y), r"SimpleNamespace with the attributes \['last_hidden_state'\]"),
        (SimpleNamespace(logits=None), r"with the attributes \['logits'\]"),
        (Named(y, y), r"Named with the fields \['loss', 'scores'\]"),
        ((None, y), "tuple of NoneType, Tensor"), ((), "tuple of nothing"), (None, "got NoneType"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=match):
            logits_of(returned)
    with pytest.raises(ValueError, match=r"got \(\)\. Wrap the model .*outputs_of="):
        dl.fit(Returning(lambda f: (f.sum(), f)), [(X, LABELS)], "classification")


# -- adapters -----------------------------------------------------------------------------------------


def scores(returned: Any) -> Tensor:
    return returned["scores"]


def inputs_of_record(batch: Any) -> tuple[Tensor, Tensor]:
    return batch["image"], batch["age"]


def targets_of_record(batch: Any) -> Tensor:
    return batch["label"][:, 0]


class Scored(Two):
    def forward(self, a: Tensor, b: Tensor) -> Any:
        return {"scores": super().forward(a, b), "features": a}


RECORD = {"image": A, "age": B, "label": LABELS[:, None]}
ADAPTERS: dict[str, Any] = {"inputs_of": inputs_of_record, "targets_of": targets_of_record, "outputs_of": scores}


@QUIET
def test_adapters_say_what_a_batch_and_an_output_are(tmp_path):
    """From the fit through tuning, saving, pickling and adding data to the predictions."""
    model, plain = Scored(), Two()
    settings: dict[str, Any] = {"structure": Full(), "split": Single()}
    cut = [_data.take(RECORD, slice(0, 5)), _data.take(RECORD, slice(5, 8))]
    posterior = dl.fit(model, cut, "classification", **ADAPTERS, **settings, checkpoint=tmp_path / "progress")
    expected = dl.fit(plain, [(A, B, LABELS)], "classification", **settings)
    assert_equal(posterior.posterior.curvatures, expected.posterior.curvatures)
    exact(posterior, model, lambda p: torch.func.functional_call(model, p, (A, B))["scores"], (A, B))
    again = dl.fit(model, cut, "classification", **ADAPTERS, **settings, checkpoint=tmp_path / "progress")
    tuned, of_plain = posterior.tune(iter(cut)), expected.tune([(A, B, LABELS)])
    assert_equal(tuned.posterior.prior_precision, of_plain.posterior.prior_precision)
    tuned.save(tmp_path / "posterior")
    loaded = dl.load(tmp_path / "posterior", model, **ADAPTERS)
    wanted = of_plain.predict((A, B)).probabilities
    for one in (
        tuned,
        loaded,
        pickle.loads(pickle.dumps(tuned)),
        copy.deepcopy(tuned),
        loaded.tune(cut),
        again.tune(cut),
    ):
        assert_equal(one.predict((A, B)).probabilities, wanted)
    more = dl.fit(model, cut, "classification", **ADAPTERS, **settings, previous=posterior)
    assert more.posterior.n_data == 16
    for missing in ADAPTERS:
        others = {name: function for name, function in ADAPTERS.items() if name != missing}
        with pytest.raises(_store.StoredFileError, match=rf"got None for .*{missing}.*\. Functions .*pass {missing}="):
            dl.load(tmp_path / "posterior", model, **others)
    posterior.fitted.save(tmp_path / "fit")
    with pytest.raises(ValueError, match=r"function outputs_of \(tests.test_calls.scores\).*pass outputs_of="):
        type(posterior.fitted).load(tmp_path / "fit", model)
    assert type(posterior.fitted).load(tmp_path / "fit", model, scores).network.n_outputs == 3


def test_one_adapter_alone():
    """What is not adapted is read as it is without: the last of a tuple, what is under the key, the whole."""
    plain = dl.fit(Two(), [(A, B, LABELS)], "classification", structure=Diagonal(), split=Single())
    for batch, adapters in (
        ((X, LABELS), {"inputs_of": lambda batch: (batch[0][:, :3], batch[0][:, 3:])}),
        ({"x": X, "labels": LABELS}, {"inputs_of": lambda batch: {"b": batch["x"][:, 3:], "a": batch["x"][:, :3]}}),
        ({"x": X, "y": LABELS}, {"inputs_of": lambda batch: batch["x"].split([3, 2], 1), "targets_key": "y"}),
        ({"a": A, "b": B, "y": LABELS}, {"targets_of": lambda batch: batch["y"]}),
        ((A, B, LABELS + 1), {"targets_of": lambda batch: batch[2] - 1}),
        (SimpleNamespace(x=X, y=LABELS), {"inputs_of": lambda batch: (batch.x[:, :3], batch.x[:, 3:]),
                                          "targets_of": lambda batch: batch.y}),
    ):  # fmt: skip
        posterior = dl.fit(Two(), [batch], "classification", structure=Diagonal(), split=Single(), **adapters)
        assert_equal(posterior.posterior.curvatures, plain.posterior.curvatures)


def test_adapters_that_give_something_else():
    def fit(batch: Any, model: nn.Module | None = None, **adapters: Any) -> Any:
        return dl.fit(model or Two(), [batch], "classification", **adapters)

    for match, adapters in (
        (r"inputs_of to give what the model is given .*got NoneType without a tensor for a batch that is a dict",
         {"inputs_of": lambda batch: None, "targets_of": lambda batch: LABELS}),
        (r"targets_of to give the targets of a batch as a tensor, got dict for a batch that is a dict",
         {"targets_of": lambda batch: batch}),
        (r"for inputs_of, got str\. Leave it out", {"inputs_of": "image"}),
        (r"for targets_of, got int", {"targets_of": 1}),
        (r"for outputs_of, got str", {"outputs_of": "scores"}),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=match):
            fit(RECORD, **adapters)
    with pytest.raises(TypeError, match=r"outputs_of to give the tensor.*keys \['scores', 'features'\], got dict"):
        fit((A, B, LABELS), Scored(), outputs_of=lambda returned: returned)
    with pytest.raises(ValueError, match=r"one target for each of the 8 inputs"):
        fit(RECORD, inputs_of=inputs_of_record, targets_of=lambda batch: LABELS[:3])


def test_an_adapted_loader_is_as_long_and_as_often_read_as_the_loader():
    loader = DataLoader(TensorDataset(A, B, LABELS), batch_size=3)
    adapters = _data.Adapters(lambda batch: batch[0])
    made = adapters.batches(loader)
    assert (_data.length(made), _data.dataset_length(made)) == (3, 8)
    assert [len(x) for x, _ in made] == [len(x) for x, _ in made] == [3, 3, 2]
    once = adapters.batches(iter(loader))
    assert isinstance(once, Iterator)
    assert _data.length(adapters.batches(batch for batch in loader)) is None
    assert _data.Adapters().batches(loader) is loader
    with pytest.raises(TypeError, match="Expected an iterable of batches"):
        adapters.batches(3)  # type: ignore[arg-type]


@QUIET
def test_the_example_of_the_documentation():
    assert len(code_of(DOCS / "batches.md")) == 1
    batch = {"image": A, "age": B, "diagnosis": LABELS}
    names = {
        "dl": dl,
        "model": Scored(),
        "train_loader": [batch],
        "val_loader": [batch],
        "images": A[:2],
        "ages": B[:2],
    }
    names = executed(DOCS / "batches.md", **names)
    assert names["posterior"].network.n_outputs == 3


# -- wrapped models -----------------------------------------------------------------------------------


def distributed(model: nn.Module, path: Path) -> nn.Module:
    torch.distributed.init_process_group("gloo", init_method=path.as_uri(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


class LightningModule(nn.Module):
    """What Lightning calls its class of modules, with a way back from what trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Two()
        self.trainer = SimpleNamespace(model=self)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(a, b)

    def training_step(self, batch: Any, index: int) -> Tensor:
        raise AssertionError


WRAPPERS: dict[str, tuple[Callable[[Path], nn.Module], str, str]] = {
    "DataParallel": (lambda path: nn.DataParallel(Two()), "module.", "DataParallel"),
    "DistributedDataParallel": (lambda path: distributed(Two(), path), "module.", "DistributedDataParallel"),
    "compiled": (lambda path: torch.compile(Two()), "_orig_mod.", "OptimizedModule"),
    "both": (lambda path: nn.DataParallel(torch.compile(Two())), "module._orig_mod.", "DataParallel, OptimizedModule"),
    "Lightning": (lambda path: LightningModule(), "net.", "trainer and steps (a LightningModule)"),
}


@QUIET
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_models_are_used_without_their_wrappers(name, tmp_path, caplog):
    """Names stay those of the user's model; one line of the log says so."""
    make, prefix, told = WRAPPERS[name]
    model, plain = make(tmp_path / "group"), Two()
    try:
        with caplog.at_level(logging.INFO, "debiased_laplace"):
            posterior = dl.fit(model, [{"a": A, "b": B, "labels": LABELS}], "classification", split=Single())
            posterior.tune([(A, B, LABELS)], prior_precisions=torch.tensor([0.5, 1.0, 2.0]))
        assert [r.getMessage() for r in caplog.records if "without its" in r.getMessage()] == [
            f"The model's forward is used without its {told}."
        ]
        assert list(posterior.network.shapes) == [f"{prefix}{name}" for name, _ in plain.named_parameters()]
        assert posterior.network.snapshot.state().keys() == model.state_dict().keys()
        expected = dl.fit(plain, [(A, B, LABELS)], "classification", split=Single(), prior_precision=1.0)
        assert_equal(posterior.posterior.curvatures, expected.posterior.curvatures)
        assert_equal(posterior.predict((A, B)).outputs_mean, plain(A, B))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# -- models of other packages -------------------------------------------------------------------------


def frozen(model: nn.Module, *trainable: str) -> nn.Module:
    """In float64, with the parameters of some prefixes alone as trainable."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trainable))
    return model.double().eval()


def bert(n_labels: int = 3) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=16, num_labels=n_labels,
    )  # fmt: skip
    return frozen(transformers.BertForSequenceClassification(config), "bert.pooler", "classifier")


def distilbert(n_labels: int = 3) -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=30, dim=16, n_layers=1, n_heads=2, hidden_dim=20, max_position_embeddings=16, num_labels=n_labels
    )
    return frozen(transformers.DistilBertForSequenceClassification(config), "pre_classifier", "classifier")


def gpt2(n_labels: int = 3) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2, num_labels=n_labels, pad_token_id=0
    )
    return frozen(transformers.GPT2ForSequenceClassification(config), "score")


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=4, patch_size=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
        num_labels=3,
    )  # fmt: skip
    return frozen(transformers.ViTForImageClassification(config), "classifier")


def adapted(task: str | None) -> nn.Module:
    """By PEFT, whose classes take anything for a task that they are not told."""
    return peft.get_peft_model(bert(), peft.LoraConfig(task_type=task, r=2, target_modules=["query"])).double().eval()


def texts(kind: Callable[..., Any] = lambda batch: batch, **more: Callable[[int], Any]) -> list[Any]:
    """Batches of a tokenizer's collator, each as long as its longest text, with whatever else features have."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(25))]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    features = []
    for i, length in enumerate((3, 5, 2, 7, 4, 4, 6, 3)):
        ids = [1 + (3 * i + 5 * j) % 29 for j in range(length)]
        entries = {name: make(i) for name, make in more.items()}
        features.append({"input_ids": ids, "attention_mask": [1] * length, "label": i % 3, **entries})
    collate = transformers.DataCollatorWithPadding(tokenizer)
    return [kind(batch) for batch in DataLoader(features, batch_size=3, collate_fn=collate)]


def images() -> list[Any]:
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = [{"pixel_values": one, "label": i % 3} for i, one in enumerate(x)]
    return list(DataLoader(features, batch_size=3, collate_fn=transformers.default_data_collator))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "BERT": (bert, texts),
    "BERT, dictionaries": (bert, lambda: texts(dict)),
    "BERT, other entries": (bert, lambda: texts(idx=lambda i: i)),
    "DistilBERT": (distilbert, texts),
    "DistilBERT, other entries": (distilbert, lambda: texts(idx=lambda i: i)),
    "GPT-2": (gpt2, texts),
    "ViT": (vit, images),
    "PEFT": (lambda: adapted("SEQ_CLS"), texts),
    "PEFT without a task": (lambda: adapted(None), texts),
    "in parallel": (lambda: nn.DataParallel(distilbert()), texts),
}


@QUIET
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_take_what_their_collators_make(name, tmp_path):
    """Fit, tune, predict, save and load; the drop-in class; the model is never given its targets."""
    make, batches = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, loader = make(), batches()
    seen: list[set[str]] = []
    inner = model.module if isinstance(model, nn.DataParallel) else model
    inner.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    posterior = dl.fit(model, loader, "classification", structure=Full(), split=Single())
    taken = {"input_ids", "attention_mask", "pixel_values"}
    assert seen
    assert all(names and "labels" not in names and names & taken for names in seen)
    whole = loader[1]
    device = posterior.network.device  # nn.DataParallel takes a model to a card if there is one
    by_hand = {key: value.to(device) for key, value in whole.items() if key in taken}
    module = inner if inner is model else model.module
    prefix = "module." if inner is not model else ""
    exact(posterior, model, lambda p: torch.func.functional_call(
        module, {key.removeprefix(prefix): value for key, value in p.items()}, (), by_hand).logits, whole)  # fmt: skip
    tuned = posterior.tune(loader)
    tuned.save(tmp_path / "posterior")
    wanted = tuned.predict(by_hand).probabilities
    for again in (tuned, dl.load(tmp_path / "posterior", model)):
        assert_equal(again.predict(whole).probabilities, wanted, 0.0)
    drop_in = dl.DebiasedLaplace(model, "classification", hessian_structure="full", dict_key_y="labels")
    drop_in.fit(loader, split=Single())
    assert_equal(drop_in.fitted.posterior.curvatures, posterior.posterior.curvatures)
    assert drop_in(whole).shape == (len(whole["labels"]), 3)


def test_a_regression_of_transformers():
    """Logits are what a regression of theirs returns, too; targets are floats ``[N]``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = distilbert(1)
    loader = [{**batch, "labels": batch["labels"].double()} for batch in texts()]
    posterior = dl.fit(model, loader, "regression", structure=Full(), split=Single())
    whole = {key: value for key, value in loader[0].items() if key != "labels"}
    exact(posterior, model, lambda p: torch.func.functional_call(model, p, (), whole).logits, loader[0])


def test_a_model_of_transformers_takes_tuples_and_returns_them():
    """Token identities and a mask of a TensorDataset are its first two arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = bert()
    model.config.return_dict = False
    ids, mask = torch.arange(1, 25).reshape(8, 3), torch.ones(8, 3, dtype=torch.long)
    mask[0, 2] = 0
    loader = DataLoader(TensorDataset(ids, mask, LABELS), batch_size=3)
    posterior = dl.fit(model, loader, "classification", structure=Full(), split=Single())
    exact(posterior, model, lambda p: torch.func.functional_call(model, p, (ids, mask))[0], (ids, mask))
