"""The callbacks of Lightning."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import debiased_laplace as dl
from debiased_laplace.integrations.lightning import LaplaceCallback, MonitorCallback
from debiased_laplace.quadratic.monitor import SCALARS, Monitor
from tests.tolerances import assert_equal

PACKAGES = [lightning.pytorch, pytorch_lightning]


def module_of(package):
    class Classifier(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, index, dataloader_idx=0):
            return None

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.05)

    return Classifier()


@pytest.fixture(scope="module")
def loaders() -> dict[str, DataLoader]:
    x = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 1] + x[:, 2] > 0).long()
    parts = {"train": slice(0, 60), "val": slice(60, 100), "other": slice(100, 120)}
    return {name: DataLoader(TensorDataset(x[part], y[part]), 16) for name, part in parts.items()}


def trained(package, callback, folder, *loaders, module=None, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 2}
    trainer = package.Trainer(
        accelerator="cpu", enable_model_summary=False, callbacks=callback, default_root_dir=folder, **quiet | settings
    )
    module = module_of(package) if module is None else module
    trainer.fit(module, *loaders)
    return module


def test_what_would_fail_after_the_training_fails_before_it(tmp_path):
    with pytest.raises(ValueError, match="clasification"):
        LaplaceCallback("clasification")
    with pytest.raises(TypeError, match="strcture"):
        LaplaceCallback("classification", strcture=1)
    with pytest.raises(OSError, match=r"posterior\.safetensors"):
        LaplaceCallback("classification", path=tmp_path / "missing" / "posterior.safetensors")


def test_a_posterior_that_cannot_be_saved_is_kept(loaders, tmp_path):
    (tmp_path / "folder").mkdir()
    callback = LaplaceCallback("classification", path=tmp_path / "folder" / "p.safetensors", parameters="last_layer")
    (tmp_path / "folder").rmdir()
    with pytest.raises(OSError, match=r"p\.safetensors"):
        trained(PACKAGES[0], callback, tmp_path, loaders["train"], loaders["val"])
    assert callback.posterior is not None


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_it_does_what_would_be_done_by_hand(package, loaders, tmp_path):
    path = tmp_path / "posterior.safetensors"
    callback = LaplaceCallback("classification", path=path, parameters="last_layer", structure=dl.Diagonal())
    assert callback.posterior is None
    module = trained(package, callback, tmp_path, loaders["train"], loaders["val"])
    by_hand = dl.fit(module, loaders["train"], "classification", parameters="last_layer", structure=dl.Diagonal()).tune(
        loaders["val"]
    )
    x = torch.randn(5, 4)
    expected = by_hand.predict(x).probabilities
    assert_equal(callback.posterior.predict(x).probabilities, expected)
    assert_equal(dl.load(path, module).predict(x).probabilities, expected)
    assert not torch.equal(expected, module.eval()(x).softmax(1))


def test_it_leaves_the_module_and_what_is_drawn_as_they_were(loaders, tmp_path):
    states = []
    for callbacks in ([], [LaplaceCallback("classification")]):
        torch.manual_seed(3)
        module = trained(lightning.pytorch, callbacks, tmp_path, loaders["train"], loaders["val"])
        states.append((module.training, torch.get_rng_state(), *module.state_dict().values()))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*states, strict=True))


def test_the_posterior_stays_when_training_goes_on(loaders, tmp_path, recwarn):
    callback = LaplaceCallback("classification", tune=False)
    module = trained(lightning.pytorch, callback, tmp_path, loaders["train"])
    x = torch.randn(5, 4)
    before = callback.posterior.predict(x).probabilities
    with torch.no_grad():
        module.net[0].weight.add_(1)
    assert torch.equal(callback.posterior.predict(x).probabilities, before)
    assert callback.posterior.prior_source == "as it was given"
    assert not [warning for warning in recwarn if "changed" in str(warning.message)]


def test_other_data_and_a_part_of_the_module_may_be_given(loaders, tmp_path):
    callback = LaplaceCallback(
        "classification", module=lambda module: module.net, train_dataloader=loaders["other"],
        val_dataloader=loaders["val"],
    )  # fmt: skip
    trained(lightning.pytorch, callback, tmp_path, loaders["train"], [loaders["val"], loaders["other"]])
    assert callback.posterior.posterior.n_data == 20
    assert set(callback.posterior.network.shapes) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert callback.posterior.prior_source == "tuned on validation data"


def test_several_validation_sets_are_a_question(loaders, tmp_path):
    with pytest.raises(ValueError, match=r"one val_dataloader for LaplaceCallback, got 2\. Pass val_dataloader="):
        trained(
            lightning.pytorch, LaplaceCallback("classification"), tmp_path, loaders["train"],
            [loaders["val"], loaders["other"]],
        )  # fmt: skip


def test_without_validation_data_the_marginal_likelihood_decides_and_one_process_writes(loaders, tmp_path):
    module = nn.Linear(4, 1)
    x, _ = loaders["train"].dataset.tensors
    numbers = DataLoader(TensorDataset(x, x[:, :1]), 16)
    for is_first in (True, False):
        callback = LaplaceCallback("regression", path=tmp_path / str(is_first))
        trainer = SimpleNamespace(
            train_dataloader=numbers, val_dataloaders=None, is_global_zero=is_first, fast_dev_run=False
        )  # fmt: skip
        callback.on_train_end(trainer, copy.deepcopy(module))
        assert callback.posterior.prior_source == "maximum of the marginal likelihood"
    assert [path.name for path in tmp_path.iterdir()] == ["True"]


def test_a_fast_run_is_fast(loaders, tmp_path):
    callback = LaplaceCallback("classification", path=tmp_path / "posterior")
    trained(lightning.pytorch, callback, tmp_path, loaders["train"], loaders["val"], fast_dev_run=2)
    assert callback.posterior.posterior.n_data == 32
    assert callback.posterior.prior_source == "tuned on validation data"


def test_shards_are_refused(loaders, tmp_path):
    class FlatParameter(nn.Parameter):
        pass

    module = nn.Linear(4, 3)
    module.weight = FlatParameter(module.weight.detach())
    trainer = SimpleNamespace(
        train_dataloader=loaders["train"], val_dataloaders=None, is_global_zero=True, fast_dev_run=False
    )
    with pytest.raises(ValueError, match=r"whole parameters, got shards of them .* in 'weight'"):
        LaplaceCallback("classification").on_train_end(trainer, module)


# -- a monitor during training -----------------------------------------------------------------------


def monitored(package, **settings) -> tuple[nn.Module, Monitor]:
    module = module_of(package)
    return module, Monitor(module, "classification", budget=None, n_directions=2, n_data=12, **settings)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_monitor_sees_every_batch_and_leaves_the_training_alone(package, loaders, tmp_path):
    states, histories = [], []
    data = DataLoader(loaders["train"].dataset, 16, shuffle=True)
    module, monitor = monitored(package, every=3)

    class ByHand(package.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            monitor.step(batch)

    for callback in (None, MonitorCallback, ByHand):
        module, monitor = monitored(package, every=3)
        callbacks = [] if callback is None else [callback(monitor) if callback is MonitorCallback else callback()]
        torch.manual_seed(3)
        trained(package, callbacks, tmp_path, data, module=module)
        states.append((module.training, torch.get_rng_state(), *module.state_dict().values()))
        histories.append([{name: entry[name] for name in ("step", *SCALARS)} for entry in monitor.history])
    for state in states[1:]:
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(states[0], state, strict=True))
    assert histories[0] == [] and histories[1] == histories[2]
    assert [entry["step"] for entry in histories[1]] == [3, 6]


def test_a_monitor_without_a_writer_writes_to_the_loggers_and_keeps_its_state_in_checkpoints(loaders, tmp_path):
    package = PACKAGES[0]
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    module, monitor = monitored(package, every=3)
    settings = {"logger": logger, "enable_checkpointing": True, "log_every_n_steps": 1}
    trained(package, MonitorCallback(monitor), tmp_path, loaders["train"], module=module, **settings)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    steps, biases = (rows[0].split(",").index(name) for name in ("step", "curvature/bias"))
    written = [(int(row.split(",")[steps]), row.split(",")[biases]) for row in rows[1:]]
    assert [(entry["step"], pytest.approx(entry["bias"])) for entry in monitor.history] == [
        (step, float(bias)) for step, bias in written if bias
    ]
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    again, continued = monitored(package, every=3)
    trainer = package.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[MonitorCallback(continued)],
    )  # fmt: skip
    trainer.fit(again, loaders["train"], ckpt_path=checkpoint)
    assert continued.history[:2] == monitor.history
    assert [entry["step"] for entry in continued.history] == [3, 6, 11]


def test_a_monitor_of_another_network_is_refused_before_the_training(loaders, tmp_path):
    _, monitor = monitored(PACKAGES[0])
    with pytest.raises(ValueError, match="a monitor of the network that the trainer trains"):
        trained(PACKAGES[0], MonitorCallback(monitor), tmp_path, loaders["train"])
    with pytest.raises(TypeError, match="Monitor, got str"):
        MonitorCallback("classification")
