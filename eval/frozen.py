"""Memory of fits and predictions of networks of which the last blocks alone are trainable, and of whole ones.

    python eval/frozen.py [--quick] [--docs docs]

Beside them autograd's own forward and backward pass over the same data at once, and a forward pass without a graph,
which is what a frozen body needs at least. Every measurement is a process of its own; its number is the growth of the
peak resident set over what the process held before the call, after a fit of a very small network. What a forward pass
keeps for gradients is counted, to the byte: that of autograd, and that of a fit, which keeps the inputs of the
trainable layers besides. Networks have random weights, cost does not depend on them. The comparison is that of arXiv
2404.12406.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench import hardware, peak_memory, reset_peak
from documents import fill, markdown
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import debiased_laplace as dl
from debiased_laplace.evaluation.records import write_json
from debiased_laplace.evaluation.shipped.cifar10 import CifarResNet
from debiased_laplace.fitting.memory import held_by_fit
from debiased_laplace.network.network import Network

DATA, CLASSES = 16, 10


class Logits(nn.Module):
    """A Hugging Face classifier of images as a function of one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.model(pixel_values=x).logits


def resnet() -> tuple[nn.Module, Tensor, str]:
    """ResNet-20: 9 blocks with batch normalisation, images of 32 x 32."""
    return CifarResNet(), torch.randn(DATA, 3, 32, 32), r"layer\d\.\d\."


def vit() -> tuple[nn.Module, Tensor, str]:
    """192 features, 12 blocks, 65 tokens."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, image_size=32, patch_size=4, num_labels=CLASSES
    )
    return Logits(ViTForImageClassification(config)), torch.randn(DATA, 3, 32, 32), r"layers\.\d+\."


#: Networks with their inputs and the names of their blocks, and how many of the last ones are trainable; all: also what
#: lies before them.
NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor, str]], tuple[str, ...]]] = {
    "ResNet-20": (resnet, ("1", "3", "all")),
    "ViT": (vit, ("1", "4", "all")),
}
CALLS = ("forward pass", "forward and backward pass", "fit", "prediction")
COUNTED = ("kept by autograd", "kept by a fit")


def partly_frozen(network: str, trainable: str) -> tuple[nn.Module, Tensor]:
    """A network with its last blocks and what comes after them trainable, and data."""
    torch.manual_seed(0)
    model, x, pattern = NETWORKS[network][0]()
    model.eval()
    if trainable != "all":
        names = [name for name, _ in model.named_parameters()]
        block_of = {name: found[0] for name in names if (found := re.search(pattern, name))}
        blocks = list(dict.fromkeys(block_of.values()))
        first = next(i for i, name in enumerate(names) if block_of.get(name) == blocks[-int(trainable)])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names[first:])
    return model, x


def prepare(network: str, trainable: str, call: str) -> Callable[[], Any]:
    """The call to measure."""
    model, x = partly_frozen(network, trainable)
    y = torch.arange(DATA) % CLASSES
    if call == "forward pass":
        return torch.no_grad()(lambda: model(x))
    if call == "forward and backward pass":
        return lambda: F.cross_entropy(model(x), y).backward()
    if call == "fit":
        return lambda: dl.fit(model, [(x, y)], "classification", mc_samples=1)
    posterior = dl.fit(model, [(x[:4], y[:4])], "classification", mc_samples=1)
    return lambda: posterior.predict(x)


def kept_for_gradients(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Bytes that a forward pass keeps besides parameters, buffers and inputs: autograd's, and that of a fit."""
    network = Network.discover(model, x[:3])

    def kept(call: Callable[[Tensor], Any], more: Callable[[Any], list[Tensor]]) -> int:
        saved: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            result = call(x)
        saved += more(result)
        with network._replicas.one() as copy:
            known = [x, *model.parameters(), *model.buffers(), *copy.parameters(), *copy.buffers()]
        places = {tensor.untyped_storage().data_ptr() for tensor in known}
        found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
        return sum(size for place, size in found.items() if place not in places)

    return kept(model, lambda _: []), kept(network.factors, lambda f: [c.input for c in f.calls if not c.input.is_meta])


def measure(network: str, trainable: str, call: str) -> dict[str, float]:
    """In this process."""
    warnings.filterwarnings("ignore")
    if call == "counted":
        model, x = partly_frozen(network, trainable)
        held = held_by_fit(Network.discover(model, x[:3]), dl.Kronecker(), dl.CrossFit())
        sizes = zip((*COUNTED, "statistics and directions"), (*kept_for_gradients(model, x), held), strict=True)
        return {what: float(f"{size / 1e6:.5g}") for what, size in sizes}
    small = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    data = torch.randn(40, 1, 4, 4), torch.arange(40) % 3
    dl.fit(small, [data], "classification", mc_samples=1).predict(data[0])  # what is imported and set up once
    function = prepare(network, trainable, call)
    before = reset_peak("cpu")
    function()
    return {"memory_mb": float(f"{peak_memory('cpu') - before:.5g}")}


def table(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    rows = [
        [
            network, trainable if trainable == "all" else f"last {trainable} and head",
            *(f"{of_calls['counted'][what]:.1f} MB" for what in COUNTED),
            *(f"{of_calls[call]['memory_mb']:.0f} MB" for call in CALLS),
            f"{of_calls['counted']['statistics and directions']:.0f} MB",
        ]
        for network, of_network in record["networks"].items() for trainable, of_calls in of_network.items()
    ]  # fmt: skip
    return markdown(
        ["network", "trainable blocks", *COUNTED, *CALLS, "statistics and directions of a fit, at most"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true", help="the last block of one network")
    options = parser.parse_args()
    networks: dict[str, Any] = {}
    cases = [
        (network, trainable, call) for network in list(NETWORKS)[: 1 if options.quick else None]
        for trainable in NETWORKS[network][1][: 1 if options.quick else None] for call in ("counted", *CALLS)
    ]  # fmt: skip
    # Forked, so that nothing is imported again.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as processes:
        for case in cases:
            network, trainable, call = case
            result = processes.apply(measure, case)
            print(*case, result, file=sys.stderr, flush=True)
            networks.setdefault(network, {}).setdefault(trainable, {})[call] = result
    record = {"hardware": hardware("cpu"), "torch": torch.__version__, "data": DATA, "networks": networks}
    write_json(options.docs / "records" / "frozen.json", record)
    fill(options.docs / "benchmarks.md", {"frozen": table(record)})


if __name__ == "__main__":
    main()
