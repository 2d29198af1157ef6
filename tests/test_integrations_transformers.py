"""The callbacks of Hugging Face's Trainer, on tiny random models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import debiased_laplace as dl
from debiased_laplace.integrations.transformers import LaplaceTrainerCallback, MonitorTrainerCallback
from debiased_laplace.quadratic.monitor import CurvatureReading, Monitor
from tests.tolerances import assert_equal


def examples(n: int, label, seed: int = 0) -> list[dict]:
    """Texts of several lengths; the collator below is needed to make batches of them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 7, (n,), generator=generator).tolist()
    return [
        {"tokens": torch.randint(1, 20, (length,), generator=generator), "y": label(i, length)}
        for i, length in enumerate(lengths)
    ]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    tokens = pad_sequence([row["tokens"] for row in rows], batch_first=True)
    labels = [torch.as_tensor(row["y"]) for row in rows]
    per_token = labels[0].ndim and labels[0].dtype == torch.long
    stacked = pad_sequence(labels, batch_first=True, padding_value=-100) if per_token else torch.stack(labels)
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": stacked}


def model(kind=BertForSequenceClassification, **settings):
    torch.manual_seed(0)
    return kind(
        BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **settings
        )
    )


def train(network, callback, folder, data, **settings) -> Trainer:
    arguments = TrainingArguments(
        str(folder), num_train_epochs=1, per_device_train_batch_size=8, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False, **settings,
    )  # fmt: skip
    trainer = Trainer(
        network, arguments, train_dataset=data[:24], eval_dataset=data[24:], data_collator=collate,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    return trainer


def three(i: int, length: int) -> int:
    return i % 3


def test_it_does_what_would_be_done_by_hand(tmp_path):
    data, path = examples(36, three), tmp_path / "posterior.safetensors"
    # Of all data in one fold nothing depends on the order in which the trainer's loader gives them.
    settings = {"parameters": "last_layer", "sampler": dl.UniformSampler(None), "split": dl.Single()}
    callback = LaplaceTrainerCallback(eval_dataset=data[24:], path=path, **settings)
    network = model(num_labels=3).double()
    train(network, callback, tmp_path, data)
    assert network.training  # as the trainer leaves it
    by_hand = dl.fit(network, [collate(data[:24])], "classification", **settings).tune([collate(data[24:])])
    batch = collate(data[:4])
    expected = by_hand.predict(batch).probabilities
    assert_equal(callback.posterior.predict(batch).probabilities, expected)
    assert_equal(dl.load(path, network).predict(batch).probabilities, expected)
    assert callback.posterior.prior_source == "tuned on validation data"


def test_validation_data_are_those_that_the_trainer_evaluated_on(tmp_path):
    callback = LaplaceTrainerCallback(parameters="last_layer")
    network = model(num_labels=3)
    train(network, callback, tmp_path, examples(36, three), eval_strategy="epoch")
    assert callback.posterior.prior_source == "tuned on validation data"


@pytest.mark.parametrize(
    ("settings", "label", "likelihood", "source"),
    [
        ({"num_labels": 1}, lambda i, length: float(length), dl.Gaussian, "maximum of the marginal likelihood"),
        (
            {"num_labels": 2, "problem_type": "multi_label_classification"},
            lambda i, length: [float(i % 2), float(length > 4)], dl.Bernoulli, "as it was given",
        ),
    ],
    ids=["regression", "labels"],
)  # fmt: skip
def test_the_head_says_what_the_outputs_mean(tmp_path, settings, label, likelihood, source):
    regression = likelihood is dl.Gaussian
    callback = LaplaceTrainerCallback(tune=regression, parameters="last_layer")
    train(model(**settings), callback, tmp_path, examples(36, label))
    assert type(callback.posterior.likelihood) is likelihood
    assert callback.posterior.prior_source == source
    assert callback.posterior.predict(collate(examples(3, label))).mean.shape == (3, settings["num_labels"])


def test_tokens_with_labels_are_sites(tmp_path):
    def tags(i: int, length: int) -> list[int]:
        return [position % 3 for position in range(length)]

    callback = LaplaceTrainerCallback(tune=False, parameters="last_layer")
    train(model(BertForTokenClassification, num_labels=3), callback, tmp_path, examples(36, tags))
    batch = collate(examples(3, tags))
    assert callback.posterior.predict(batch).probabilities.shape == (*batch["input_ids"].shape, 3)


def test_adapters_are_what_is_uncertain(tmp_path):
    adapted = get_peft_model(model(num_labels=3), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in trainable)
    data = examples(36, three)
    callback = LaplaceTrainerCallback(eval_dataset=data[24:])
    train(adapted, callback, tmp_path, data)
    assert set(callback.posterior.network.shapes) == trainable
    assert callback.posterior.predict(collate(data[:4])).probabilities.shape == (4, 3)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_each_has_its_shard_of_the_validation_data(tmp_path, monkeypatch, rank):
    data, given = examples(12, three), []
    callback = LaplaceTrainerCallback(eval_dataset=data[4:])
    monkeypatch.setattr(callback, "fit", lambda *arguments, saves: given.extend([*arguments, saves]))
    callback.on_train_end(
        SimpleNamespace(world_size=2, process_index=rank, per_device_eval_batch_size=3),
        SimpleNamespace(is_world_process_zero=rank == 0), None, model=model(num_labels=3),
        train_dataloader=DataLoader(data[:4], 2, collate_fn=collate),
    )  # fmt: skip
    _, likelihood, train, validation, saves = given
    assert (likelihood, saves) == ("classification", rank == 0)
    assert torch.cat([batch["labels"] for batch in train]).tolist() == [0, 1, 2, 0]
    assert torch.cat([batch["labels"] for batch in validation]).tolist() == [row["y"] for row in data[4 + rank :: 2]]


# -- a monitor during training -----------------------------------------------------------------------


def test_a_monitor_draws_from_the_training_data_and_leaves_the_training_alone(tmp_path):
    data, states = examples(36, three), []
    for with_monitor in (False, True):
        network = model(num_labels=3).double()
        monitor = Monitor(network, "classification", every=3, budget=None, n_directions=2)
        callback = MonitorTrainerCallback(monitor)
        train(network, callback if with_monitor else TrainerCallback(), tmp_path, data)
        states.append([*network.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    (entry,) = monitor.history
    generator = torch.Generator().manual_seed(0)
    batches = [collate([data[i] for i in torch.randperm(24, generator=generator)[:8].tolist()]) for _ in range(3)]
    quadratics = tuple(dl.Quadratic(network, batch, "classification") for batch in batches)
    expected = CurvatureReading.of(quadratics, 2, 0.1).scalars()
    assert entry["step"] == 3  # the last: the network has its weights
    assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_a_monitor_refuses_streams_and_models_of_others_before_the_training(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(examples(24, three))

    network = model(num_labels=3)
    callback = MonitorTrainerCallback(Monitor(network, "classification"))
    with pytest.raises(ValueError, match=r"of another network.*model_init="):
        train(model(num_labels=3), callback, tmp_path, examples(36, three))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False
    )
    trainer = Trainer(network, arguments, train_dataset=Stream(), data_collator=collate, callbacks=[callback])
    with pytest.raises(TypeError, match=r"Expected training data with a length.*monitor\.step\(inputs\)"):
        trainer.train()
