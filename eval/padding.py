"""What it costs to look for padding in a Transformer's pass over the data, relative to forward passes.

    python eval/padding.py [--data 8192] [--length 64] [--repeats 3]

Three passes over the same padded batches, alternately: one that observes nothing; one that observes the inputs of every
datum without a backward pass, which is right without padding alone; and that of a fit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from debiased_laplace.curvature.structures import Diagonal, Kronecker
from debiased_laplace.fitting.stream import Stream
from debiased_laplace.likelihoods import Categorical
from debiased_laplace.network.factors import Factors
from debiased_laplace.network.network import Network

Batch = tuple[dict[str, Tensor], Tensor]


class Encoder(nn.Module):
    """Embedded tokens, two layers of attention with key_padding_mask, and a mean over unmasked positions."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(2000, width), nn.Linear(width, 4)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Outputs ``[N, 4]``."""
        share = batch["mask"][..., None].float()
        hidden = self.layers(self.embedding(batch["tokens"]), src_key_padding_mask=~batch["mask"])
        return self.head((hidden * share).sum(1) / share.sum(1))


def batches(n: int, length: int) -> list[Batch]:
    """Batches of 64 with lengths that are equally likely."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2000, (n, length), generator=generator)
    mask = torch.arange(length) < torch.randint(1, length + 1, (n, 1), generator=generator)
    labels = torch.randint(4, (n,), generator=generator)
    data = zip(tokens.split(64), mask.split(64), labels.split(64), strict=True)
    return [({"tokens": t, "mask": m}, y) for t, m, y in data]


def seconds(stream: Stream, data: list[Batch]) -> float:
    start = time.perf_counter()
    for inputs, labels in data:
        stream(inputs, labels)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=int, default=8192)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, data = Encoder().eval(), batches(arguments.data, arguments.length)
    network, blind = (Network.discover(model, data[0][0]) for _ in range(2))
    blind.has_sequences = False
    has_gradient = Factors.has_gradient

    def without_backward() -> float:
        Factors.has_gradient = lambda self, block: None  # type: ignore[method-assign]
        try:
            return seconds(Stream(lambda *_: blind, Categorical(), Kronecker()), data)
        finally:
            Factors.has_gradient = has_gradient  # type: ignore[method-assign]

    passes: dict[str, Callable[[], float]] = {
        "forward passes alone": lambda: seconds(Stream(lambda *_: network, Categorical(), Diagonal()), data),
        "inputs of every datum, no backward pass": without_backward,
        "inputs and padding of some data": lambda: seconds(
            Stream(lambda *_: network, Categorical(), Kronecker()), data
        ),
    }
    rounds = [{name: run() for name, run in passes.items()} for _ in range(arguments.repeats)]
    for name in passes:
        ratios = sorted(times[name] / times["forward passes alone"] for times in rounds)
        print(f"{name:42} ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
