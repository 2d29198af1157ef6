"""Memory of fits and predictions of Transformers of which the last block alone is trainable, and of whole ones.

    python eval/frozen.py [--quick] [--docs docs]

Beside them autograd's own forward and backward pass over the same 64 data at once, and a forward pass without a graph,
which is what a frozen body needs at least. Every measurement is a fresh process; its number is the growth of the peak
resident set over what the process held before the call. Networks have random weights, cost does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench import hardware, peak_memory, reset_peak, timed
from documents import fill, markdown
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.evaluation.records import write_json

DATA, CLASSES = 64, 10


class Logits(nn.Module):
    """A Hugging Face classifier as a function of one tensor."""

    def __init__(self, model: nn.Module, argument: str) -> None:
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.model(**{self.argument: x}).logits


def vit() -> tuple[nn.Module, Tensor, str]:
    """192 features, 12 blocks, 65 tokens."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, image_size=32, patch_size=4, num_labels=CLASSES
    )
    model = Logits(ViTForImageClassification(config), "pixel_values")
    return model, torch.randn(DATA, 3, 32, 32), "layers.11."


def bert() -> tuple[nn.Module, Tensor, str]:
    """192 features, 6 blocks, 128 tokens, a vocabulary of 8,000."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=8000, hidden_size=192, num_attention_heads=3, intermediate_size=768, num_hidden_layers=6,
        num_labels=CLASSES,
    )  # fmt: skip
    model = Logits(BertForSequenceClassification(config), "input_ids")
    return model, torch.randint(1, 8000, (DATA, 128)), "layer.5."


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor, str]]] = {"ViT": vit, "BERT": bert}
TRAINABLE = ("all", "last block and head")
CALLS = ("forward pass", "forward and backward pass", "fit", "prediction")


def prepare(network: str, trainable: str, call: str) -> Callable[[], Any]:
    """The call to measure."""
    torch.manual_seed(0)
    model, x, last = NETWORKS[network]()
    model.eval()
    y = torch.arange(DATA) % CLASSES
    if trainable != "all":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(last in name or "classifier" in name)
    if call == "forward pass":
        return torch.no_grad()(lambda: model(x))
    if call == "forward and backward pass":
        return lambda: F.cross_entropy(model(x), y).backward()
    if call == "fit":
        return lambda: dl.fit(model, [(x, y)], "classification", mc_samples=1)
    posterior = dl.fit(model, [(x[:4], y[:4])], "classification", mc_samples=1)
    return lambda: posterior.predict(x)


def measure(network: str, trainable: str, call: str) -> dict[str, float]:
    """In this process."""
    warnings.filterwarnings("ignore")
    function = prepare(network, trainable, call)
    before = reset_peak("cpu")
    seconds = timed(function, "cpu")
    return {"seconds": seconds, "memory_mb": peak_memory("cpu") - before}


def table(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    rows = [
        [network, trainable, *(f"{of_calls[call]['memory_mb']:.0f} MB" for call in CALLS)]
        for network, of_network in record["networks"].items() for trainable, of_calls in of_network.items()
    ]  # fmt: skip
    return markdown(["network", "trainable", *CALLS], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true", help="one network")
    parser.add_argument("--one", nargs=3, metavar=("NETWORK", "TRAINABLE", "CALL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    networks: dict[str, Any] = {}
    for network in list(NETWORKS)[: 1 if options.quick else None]:
        for trainable in TRAINABLE:
            for call in CALLS:
                done = subprocess.run(
                    [sys.executable, __file__, "--one", network, trainable, call], capture_output=True, text=True
                )
                if done.returncode != 0:
                    sys.exit(done.stderr)
                result = json.loads(done.stdout.strip().splitlines()[-1])
                print(network, trainable, call, result, file=sys.stderr)
                networks.setdefault(network, {}).setdefault(trainable, {})[call] = result
    record = {"hardware": hardware("cpu"), "torch": torch.__version__, "data": DATA, "networks": networks}
    write_json(options.docs / "records" / "frozen.json", record)
    fill(options.docs / "benchmarks.md", {"frozen": table(record)})


if __name__ == "__main__":
    main()
