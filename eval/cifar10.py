"""The demonstration's comparison on real images: a trained ResNet-20 or ResNet-56 on CIFAR-10, all layers.

    python eval/cifar10.py --data-dir <folder> [--depth 56] [--images 10000] [--seeds 3] [--quick]

The folder holds ``train_first10k.npz`` and ``test_first1k.npz`` (``images`` uint8 [n, 32, 32, 3] and ``labels``) and
the checkpoints of akamaster/pytorch_resnet_cifar10. A seed splits the test images into validation and test
data, since the networks fit their training images almost perfectly, and draws the curvature data. Records, tables and
report have the form of ``debiased-laplace demo``; finished seeds are kept and used again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from networks import trained_cifar_resnet
from rich.console import Console
from torch import Tensor

from debiased_laplace.evaluation import shifts
from debiased_laplace.evaluation.compare import run
from debiased_laplace.evaluation.demo import resolve_device
from debiased_laplace.evaluation.report import write_outputs
from debiased_laplace.evaluation.summary import summarise
from debiased_laplace.evaluation.tables import tables
from debiased_laplace.evaluation.tasks import Batch, Options, Task, settings_of, standard_methods

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
#: Size of the set the networks were trained on; the file holds the first fifth of it.
N_TRAIN = 50_000


def load(path: Path) -> tuple[Tensor, Tensor]:
    """Images ``[n, 3, 32, 32]`` in [0, 1], and labels."""
    if not path.exists():
        sys.exit(f"Expected {path}. Name the folder that holds it with --data-dir.")
    file = np.load(path)
    return torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(file["labels"]).long()


def normalise(images: Tensor) -> Tensor:
    return (images - MEAN) / STD


def task(seed: int, folder: Path, depth: int, n_images: int, n_test: int) -> Task:
    """The comparison of one seed."""
    images, labels = load(folder / "train_first10k.npz")
    images, labels = normalise(images[:n_images]), labels[:n_images]
    held, held_labels = load(folder / "test_first1k.npz")
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))
    validation, test = order[: min(500, 2 * n_test)], order[500 : 500 + n_test]
    inputs, known = held[test], held_labels[test]

    def batches(x: Tensor, y: Tensor) -> Iterator[Batch]:
        return zip(x.split(128), y.split(128), strict=True)

    return Task(
        name=f"CIFAR-10, ResNet-{depth}",
        description=(
            f"A ResNet-{depth} trained on the 50,000 training images of CIFAR-10, which it fits almost perfectly; all "
            "layers, batch normalisation included. Curvature data come from the first "
            f"{n_images:,} training images; the reference uses all of these. {len(validation)} test images tune the "
            f"prior precision and {n_test} others judge. The checkpoint was chosen on the test set, so accuracies are "
            "optimistic."
        ),
        model=lambda device: trained_cifar_resnet(depth, folder).to(device),
        train=lambda: batches(images, labels),
        validation=lambda: batches(normalise(held[validation]), held_labels[validation]),
        tests={
            "test": (normalise(inputs), known),
            "noise": (normalise(shifts.gaussian_noise(inputs, 0.1, seed=seed)), known),
            "rotation": (normalise(shifts.rotate(inputs, 15.0)), known),
        },
        ood={"shuffled patches": normalise(shifts.shuffle_patches(inputs, 4, seed=seed))},
        n_data=N_TRAIN,
        seeds="A seed decides which test images tune and which judge, and the draw of the curvature data.",
        notes={
            "test": "Test images as they are.",
            "noise": "Gaussian noise of standard deviation 0.1 added to every pixel, clipped to [0, 1].",
            "rotation": "Turned by 15 degrees counter-clockwise, linear interpolation, black outside.",
            "shuffled patches": "Each test image cut into patches of 4 x 4 pixels, put back in a random order.",
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the images and the checkpoints")
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20)
    parser.add_argument(
        "--images", type=int, default=10_000, help="training images to draw from; the reference uses all"
    )
    parser.add_argument("--budget", type=int, default=128, help="curvature data of the mini-batch methods")
    parser.add_argument("--tests", type=int, default=500, help="test images, at most 500")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=None, help="results/cifar10-resnet<depth> by default")
    parser.add_argument("--quick", action="store_true", help="one seed, few data: to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.images, options.budget, options.tests, options.seeds = 128, 32, 32, 1
    out = options.out or Path("results") / f"cifar10-resnet{options.depth}{'-quick' if options.quick else ''}"
    try:
        device = resolve_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    methods = tuple(
        method
        if method.kind != "laplace"
        else type(method)(**{**vars(method), "fit": {**method.fit, "n_data": N_TRAIN}})
        for method in standard_methods(options.budget)
    )
    judged = Options(batch_size=100, distance_inputs=min(options.tests, 250), log_prior_prec_max=6.0)
    settings = settings_of(
        methods, judged, device, task="cifar10", depth=options.depth, images=options.images, tests=options.tests
    )
    records = run(
        out, range(options.seeds),
        lambda seed: task(seed, options.data_dir, options.depth, options.images, options.tests),
        methods, judged, settings=settings, device=device,
        progress=lambda seed, step: print(f"seed {seed}: {step}", file=sys.stderr, flush=True),
    )  # fmt: skip
    summary = summarise(records)
    paths = write_outputs(
        out, summary, title=f"Debiased Laplace on CIFAR-10, ResNet-{options.depth}",
        notice="A quick run on few data: it shows that everything works, and decides nothing." if options.quick else "",
    )  # fmt: skip
    console = Console(width=110)
    for part in tables(summary):
        console.print(part)
    for name, path in paths.items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()
