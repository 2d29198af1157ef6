"""A of convolutions and of K-FAC-reduce: ours, with patches, and as tensor networks, for layers of two networks.

    python eval/convolutions.py [--layers "3 x 3, 56"] [--repeats 3] [--quick] [--docs docs]

Layer shapes are those of ResNet-50 and ConvNeXt-T on images of 224 x 224. Times are processor times of one thread, all
sides of a layer in turns in one process, as medians in forward passes of the layer; memory is the growth of the peak
resident set in a process of its own for every side. "Patches" is torch's ``unfold`` and a product of matrices; tensor
networks are those of einconv (Dangel, arXiv 2307.02275), with and without its simplifications.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from bench import hardware, peak_memory, reset_peak
from documents import fill, markdown
from einconv.expressions import convNd_kfac_reduce, convNd_kfc
from torch import Tensor, nn

from debiased_laplace.curvature.sharing import Expand, Reduce
from debiased_laplace.curvature.structures import Kronecker, Window
from debiased_laplace.evaluation.records import read_json, write_json
from debiased_laplace.network.network import Network


@dataclass(frozen=True)
class Layer:
    """A convolution of square images and kernels."""

    inputs: int
    outputs: int
    size: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1


LAYERS = {
    "ResNet stem, 7 x 7, stride 2": Layer(3, 64, 224, 7, 2, 3), "ResNet 1 x 1, 56": Layer(64, 256, 56, 1),
    "ResNet 1 x 1, stride 2, 56": Layer(256, 512, 56, 1, 2), "ResNet 3 x 3, 56": Layer(64, 64, 56, 3, 1, 1),
    "ResNet 3 x 3, stride 2, 56": Layer(128, 128, 56, 3, 2, 1), "ResNet 3 x 3, 14": Layer(256, 256, 14, 3, 1, 1),
    "ResNet 3 x 3, 7": Layer(512, 512, 7, 3, 1, 1), "ConvNeXt stem, 4 x 4, stride 4": Layer(3, 96, 224, 4, 4),
    "ConvNeXt 2 x 2, stride 2, 56": Layer(96, 192, 56, 2, 2),
    "ConvNeXt depthwise 7 x 7, 56": Layer(96, 96, 56, 7, 1, 3, 96),
    "ConvNeXt depthwise 7 x 7, 14": Layer(384, 384, 14, 7, 1, 3, 384),
    "ConvNeXt depthwise 7 x 7, 7": Layer(768, 768, 7, 7, 1, 3, 768),
}  # fmt: skip
SIDES = ("ours", "patches", "tensor network", "tensor network, simplified")
FACTORS = ("expand", "reduce")
N_IMAGES = 8


def module(layer: Layer) -> nn.Conv2d:
    return nn.Conv2d(
        layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.padding, groups=layer.groups, bias=False
    )


def ours(layer: Layer, images: Tensor, factor: str) -> Callable[[], Tensor]:
    """As a fit looks at the inputs of its stream."""
    model = nn.Sequential(module(layer), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(layer.outputs, 1))
    network = Network.discover(model, images[:2], parameters=["0.weight"])
    factors = network.factors(images, backward=False)
    structure = Kronecker(sharing=Expand() if factor == "expand" else Reduce())
    return lambda: structure.observe(network, factors, lambda _: [Window(slice(0, len(images)), 1)]).totals[0]


def patches(layer: Layer, images: Tensor, factor: str) -> Callable[[], Tensor]:
    def of_patches() -> Tensor:
        columns = F.unfold(images, layer.kernel, padding=layer.padding, stride=layer.stride)
        columns = columns.unflatten(1, (layer.groups, -1))
        columns = columns if factor == "expand" else columns.mean(-1, keepdim=True)
        flat = columns.permute(1, 2, 0, 3).flatten(2)
        return flat @ flat.mT

    return of_patches


def tensor_network(layer: Layer, images: Tensor, factor: str, simplify: bool) -> Callable[[], Tensor]:
    rule = convNd_kfc if factor == "expand" else convNd_kfac_reduce

    def contracted() -> Tensor:
        equation, operands, shape = rule.einsum_expression(
            images, layer.kernel, layer.stride, layer.padding, groups=layer.groups, simplify=simplify
        )
        return len(images) * torch.einsum(equation, *operands).reshape(shape)

    return contracted


MAKE: dict[str, Callable[[Layer, Tensor, str], Callable[[], Tensor]]] = {
    "ours": ours, "patches": patches, "tensor network": partial(tensor_network, simplify=False),
    "tensor network, simplified": partial(tensor_network, simplify=True),
}  # fmt: skip


def images_of(layer: Layer, n: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(n, layer.inputs, layer.size, layer.size)


def processor_time(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def times(layer: Layer, n: int, repeats: int) -> dict[str, Any]:
    """Medians in forward passes of the layer; and how far the others are from ours."""
    images, convolution = images_of(layer, n), module(layer)
    functions: dict[tuple[str, str], Callable[[], Tensor]] = {
        (factor, side): make(layer, images, factor) for factor in FACTORS for side, make in MAKE.items()
    }
    with torch.no_grad():
        results = {key: function() for key, function in functions.items()}
        differences = [
            float((result - results[factor, "ours"]).abs().max() / result.abs().max())
            for (factor, _), result in results.items()
        ]
        results.clear()
        seconds: dict[Any, list[float]] = {key: [] for key in ("forward", *functions)}
        for _ in range(repeats):
            seconds["forward"].append(processor_time(lambda: convolution(images)))
            for key, function in functions.items():
                seconds[key].append(processor_time(function))
    forward = median(seconds.pop("forward"))
    ratios: dict[str, Any] = {factor: {} for factor in FACTORS}
    for (factor, side), values in seconds.items():
        ratios[factor][side] = median(values) / forward
    return {"forward_ms": 1000 * forward / n, "difference": max(differences), "times": ratios}


def memory(layer: Layer, n: int, factor: str, side: str) -> float:
    """Growth of the peak in this process, in MB, by one call."""
    torch.set_num_threads(1)
    function = MAKE[side](layer, images_of(layer, n), factor)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed on the way here is not there for the call
    with torch.no_grad():
        before = reset_peak("cpu")
        function()
    return peak_memory("cpu") - before


def of_layer(layer: Layer, n: int, repeats: int) -> dict[str, Any]:
    fresh = multiprocessing.get_context("fork")
    peaks: dict[str, Any] = {factor: {} for factor in FACTORS}
    for factor in FACTORS:
        for side in SIDES:
            with fresh.Pool(1) as pool:
                peaks[factor][side] = pool.apply(memory, (layer, n, factor, side))
    with fresh.Pool(1) as pool:
        return asdict(layer) | pool.apply(times, (layer, n, repeats)) | {"memory_mb": peaks}


def rounded(value: Any) -> Any:
    """With four digits."""
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(record: Mapping[str, Any], factor: str) -> str:
    """Times in forward passes, and memory; the smallest time of a layer in bold."""
    rows = []
    for name, layer in record["layers"].items():
        of_time, of_memory = layer["times"][factor], layer["memory_mb"][factor]
        best = min(of_time.values())
        cells = [f"**{t:.2f}**" if t == best else f"{t:.2f}" for t in (of_time[side] for side in SIDES)]
        rows.append([name, f"{layer['forward_ms']:.1f} ms", *cells, *(f"{of_memory[side]:.0f}" for side in SIDES)])
    return markdown(["layer", "forward", *SIDES, *(f"MB, {side}" for side in SIDES)], rows)


def parts(record: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the document."""
    return {f"convolutions {factor}": table(record, factor) for factor in FACTORS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true", help="two layers and images, nothing is written into documents")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n = 2 if options.quick else N_IMAGES
    if options.quick:
        options.layers, options.repeats = ["ResNet 1 x 1, 56", "ConvNeXt depthwise 7 x 7, 7"], 1
    path = options.docs / "records" / "convolutions.json"
    record = read_json(path) if path.exists() else {}
    record = {"hardware": hardware("cpu"), "torch": torch.__version__, "n": n, "layers": record.get("layers", {})}
    for name in options.layers:
        record["layers"][name] = rounded(of_layer(LAYERS[name], n, options.repeats))
        print(name, record["layers"][name], file=sys.stderr, flush=True)
        write_json(path, record)
    if not options.quick:
        fill(options.docs / "benchmarks.md", parts(record))


if __name__ == "__main__":
    main()
