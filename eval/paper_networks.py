"""Networks of ``paper.py``: their data, and how they are trained. Weights are kept, and used again if all is the same.

All-CNN-C and a vision Transformer see the same images of CIFAR-10, with the same augmentation; a smaller Transformer
is that of ``vit.py``, on Fashion-MNIST; a network on scikit-learn's digits is for tests.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import all_cnn_c
import torch
import torch.nn.functional as F
import vit
from networks import digits_cnn
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

from debiased_laplace._guards import full_precision, global_random_state
from debiased_laplace.evaluation.shipped import cifar10, digits, fashion_mnist
from debiased_laplace.evaluation.shipped.common import fingerprint, initialised

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, by AdamW with a warm-up and a cosine schedule.

    Attributes:
        epochs: At most.
        batch: Size of mini-batches.
        rate: Largest learning rate.
        decay: AdamW's weight decay.
        shift: Images are moved by up to so many pixels along both axes, and mirrored half of the time; 0 for neither.
        dropout: Whether All-CNN-C's own dropout is there in training.
    """

    epochs: int
    batch: int
    rate: float
    decay: float
    shift: int = 0
    dropout: bool = False


@dataclass(frozen=True)
class Subject:
    """A kind of network.

    Attributes:
        title: For tables.
        build: Gives it with random weights.
        data: Training and test data, from the folder of the data, a cache, and whether few of them will do.
        recipe: How it is trained.
        quick_epochs: If little will do.
    """

    title: str
    build: Callable[[], nn.Module]
    data: Callable[[Path | None, Path, bool], tuple[Batch, Batch]]
    recipe: Recipe
    quick_epochs: int = 2


@dataclass(frozen=True)
class Trained:
    """A trained network in evaluation mode with its data, which stay on the CPU, and facts of its training."""

    title: str
    model: nn.Module
    train: Batch
    test: Batch
    facts: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Of the network."""
        return next(self.model.parameters()).device


# -- data ------------------------------------------------------------------------------------------


def joined(*loaders: Any) -> Batch:
    """All data of loaders."""
    inputs, targets = zip(*(batch for loader in loaders for batch in loader), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def cifar(folder: Path | None, cache: Path, quick: bool) -> tuple[Batch, Batch]:
    """The training images at hand and all test images."""
    common: dict[str, Any] = {"cache": cache, "data_dir": folder, "quick": quick}
    train = joined(cifar10.train_loader(**common))
    return train, joined(cifar10.val_loader(seed=0, **common), cifar10.test_loader(seed=0, **common))


def fashion(folder: Path | None, cache: Path, quick: bool) -> tuple[Batch, Batch]:
    """All images; the test images in their order."""
    common: dict[str, Any] = {"cache": cache, "data_dir": folder, "quick": quick}
    return joined(fashion_mnist.train_loader(**common)), joined(
        fashion_mnist.val_loader(**common), fashion_mnist.test_loader(**common)
    )


def embedded(folder: Path | None, cache: Path, quick: bool) -> tuple[Batch, Batch]:
    """Scikit-learn's digits."""
    parts = digits.split(0)
    train, test = (tuple(part) for part in (parts.train, parts.test))
    return (train[0][:600], train[1][:600]) if quick else train, test


SUBJECTS = {
    "all-cnn-c": Subject(
        "All-CNN-C, CIFAR-10", all_cnn_c.network, cifar, Recipe(300, 128, 1e-3, 5e-2, shift=4, dropout=True)
    ),
    "vit": Subject("ViT, Fashion-MNIST", vit.network, fashion, Recipe(10, 64, 2e-3, 1e-2)),
    "vit-cifar10": Subject(
        "ViT, CIFAR-10", partial(vit.ViT, 4, 128, 4, 4, side=32, channels=3), cifar,
        Recipe(200, 128, 1e-3, 5e-2, shift=4),
    ),
    "digits": Subject("CNN, digits", digits_cnn, embedded, Recipe(30, 64, 2e-3, 1e-2), 30),
}  # fmt: skip


# -- training --------------------------------------------------------------------------------------


def subject(
    name: str, folder: Path | None, out: Path, device: torch.device, *, quick: bool = False, seconds: float = math.inf
) -> Trained:
    """A trained network: with the weights in ``<out>/<name>.safetensors``, if they are of these data and this recipe.

    Args:
        name: Of :data:`SUBJECTS`.
        folder: Of the data.
        out: For the weights.
        device: Where it is trained and wanted.
        quick: One epoch on few data.
        seconds: Of training; epochs are fewer if the first ones say that all would take longer.
    """
    about = SUBJECTS[name]
    train, test = about.data(folder, out / "cache", quick)
    recipe = replace(about.recipe, epochs=about.quick_epochs) if quick else about.recipe
    settings = {"recipe": asdict(recipe), "data": fingerprint(*train), "network": repr(about.build())}
    path = out / f"{name}.safetensors"
    model = initialised(about.build, 0).to(device)
    facts = weights_of(path, settings)
    if facts is None:
        facts = trained(model, train, recipe, seconds)
        out.mkdir(parents=True, exist_ok=True)
        state = {key: tensor.contiguous().cpu() for key, tensor in model.state_dict().items()}
        save_file(state, path, metadata={"settings": json.dumps(settings), "facts": json.dumps(facts)})
    model.load_state_dict(load_file(path))  # as a later run has them
    model.eval()
    n = min(2_000, len(train[0]))
    scored = {"train": (train[0][:n], train[1][:n]), "test": test}
    facts = facts | {
        "n_train": len(train[0]), "n_test": len(test[0]), "n_parameters": sum(p.numel() for p in model.parameters()),
        **{part: dict(zip(("loss", "accuracy"), scores(model, data), strict=True)) for part, data in scored.items()},
    }  # fmt: skip
    return Trained(about.title, model, train, test, facts)


def weights_of(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Facts of the training that the weights in a file come from; None if it was another, or there is no file."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return json.loads(metadata["facts"]) if metadata.get("settings") == json.dumps(settings) else None


def trained(model: nn.Module, data: Batch, recipe: Recipe, seconds: float) -> dict[str, Any]:
    """Train in place; facts about it."""
    device = next(model.parameters()).device
    inputs, targets = (part.to(device) for part in data)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=recipe.decay)
    running = with_dropout(model) if recipe.dropout else model
    running.train()
    steps, epochs = -(-len(inputs) // recipe.batch), recipe.epochs
    start, epoch, first = time.perf_counter(), 0, 0.0
    precision, torch.backends.cudnn.benchmark = torch.get_float32_matmul_precision(), True
    torch.set_float32_matmul_precision("high")  # nothing is measured here
    with global_random_state():
        torch.manual_seed(0)
        while epoch < epochs:
            order = torch.randperm(len(inputs), generator=generator).to(device)
            changes = changes_of(len(inputs), recipe.shift, generator).to(device)
            for step, index in enumerate(order.split(recipe.batch)):
                progress = (epoch + (step + 1) / steps) / epochs
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate * min(progress / 0.05, 0.5 * (1 + math.cos(math.pi * progress)))
                optimizer.zero_grad()
                images = augmented(inputs[index], recipe.shift, changes[:, index])
                F.cross_entropy(running(images), targets[index]).backward()
                optimizer.step()
            wait_for(device)
            epoch += 1
            spent = time.perf_counter() - start
            first = first or spent  # slower than the others
            if epoch == 3:
                epochs = max(epoch, int(min(epochs, (seconds - first) / ((spent - first) / 2))))
            if epoch % max(1, epochs // 10) == 0:
                print(f"epoch {epoch} of {epochs}, {spent:.0f} s", flush=True)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = False
    model.eval()
    return {"epochs": epochs, "seconds": time.perf_counter() - start}


def wait_for(device: torch.device) -> None:
    """Until all that was asked of a device is done: reading a number waits."""
    torch.ones((), device=device).item()


def with_dropout(network: nn.Module) -> nn.Module:
    """All-CNN-C with its dropout (arXiv 1412.6806): a fifth of the inputs, half of what a stride leaves."""
    layers: list[nn.Module] = [nn.Dropout(0.2)]
    for layer in network.children():
        after_stride = isinstance(layers[-1], nn.Conv2d) and layers[-1].stride == (2, 2)
        layers += [layer, nn.Dropout(0.5)] if after_stride else [layer]
    return nn.Sequential(*layers)


def changes_of(n: int, shift: int, generator: torch.Generator) -> Tensor:
    """How far n images are moved down and to the right, from 0 to twice the shift, and whether mirrored, ``[3, n]``."""
    moves = torch.randint(2 * shift + 1, (2, n), generator=generator)
    return torch.cat([moves, torch.randint(2, (1, n), generator=generator)])


def augmented(images: Tensor, shift: int, changes: Tensor) -> Tensor:
    """Images moved by up to ``shift`` pixels, with zeros where none were, and mirrored half of the time."""
    if not shift:
        return images
    n, _, height, width = images.shape
    down, right, mirrored = changes[:, :, None]
    every = torch.arange(max(n, height, width), device=images.device)
    columns = torch.where(mirrored > 0, width - 1 - every[:width], every[:width]) + right
    padded = F.pad(images, [shift] * 4).permute(0, 2, 3, 1)
    moved = padded[every[:n, None, None], (every[:height] + down)[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)  # channels are last in memory: faster convolutions


@torch.no_grad()
def scores(model: nn.Module, data: Batch) -> tuple[float, float]:
    """Mean loss and accuracy, in full single precision."""
    device = next(model.parameters()).device
    with full_precision():
        outputs = torch.cat([model(part.to(device)) for part in data[0].split(1000)])
    targets = data[1].to(device)
    return float(F.cross_entropy(outputs, targets)), float((outputs.argmax(-1) == targets).double().mean())
