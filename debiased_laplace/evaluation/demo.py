"""The demonstration: scikit-learn's digits, a small CNN, and every method; no download.

``debiased-laplace demo`` on the command line, or :func:`demo` here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debiased_laplace.evaluation import shifts
from debiased_laplace.evaluation.compare import run
from debiased_laplace.evaluation.figures import Picture, examples_picture
from debiased_laplace.evaluation.report import write_outputs
from debiased_laplace.evaluation.summary import summarise
from debiased_laplace.evaluation.tasks import Batch, Options, Task, settings_of, standard_methods

#: Names of the conditions.
TEST, NOISE, ROTATION, SHUFFLED, BLOBS = "test", "noise", "rotation", "shuffled digits", "smooth blobs"
BATCH_SIZE = 128


@dataclass(frozen=True)
class DemoSettings:
    """What the demonstration does; everything but the seed and the device.

    Attributes:
        n_seeds: Repetitions.
        epochs: Of training.
        learning_rate: Adam's.
        budget: Training data spent on curvature by the mini-batch methods.
        train_fraction: Of the 1,797 images.
        validation_fraction: Likewise.
        test_fraction: Likewise.
        noise: Standard deviation of the noise, in units of the full intensity range.
        degrees: Angle of the rotation, counter-clockwise.
        patch: Edge of the shuffled patches, in pixels.
        blur: Standard deviation of the blur of the blobs, in pixels.
    """

    n_seeds: int = 8
    epochs: int = 15
    learning_rate: float = 1e-2
    budget: int = 64
    train_fraction: float = 0.5
    validation_fraction: float = 0.2
    test_fraction: float = 0.3
    noise: float = 0.3
    degrees: float = 20.0
    patch: int = 2
    blur: float = 1.0


FULL = DemoSettings()
QUICK = DemoSettings(n_seeds=2, epochs=8, test_fraction=0.15)
#: Steps of one seed: training, the methods, the distances between posteriors.
STEPS = len(standard_methods(FULL.budget)) + 2


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration gives.

    Attributes:
        summary: Of all seeds.
        paths: Of the files written, by name.
        reused: Number of seeds whose records were there already.
        seconds: Wall-clock time.
    """

    summary: dict[str, Any]
    paths: dict[str, Path]
    reused: int
    seconds: float


def demo(
    out: Path | str,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    quick: bool = False,
    settings: DemoSettings | None = None,
    progress: Callable[[int, str], None] = lambda seed, step: None,
) -> DemoResult:
    """Run all seeds and write the results.

    Args:
        out: Folder for the results; records of finished seeds with the same settings are used again.
        seed: The first seed; the others follow it.
        device: Where the models run.
        quick: Two seeds and a shorter training.
        settings: Other settings altogether.
        progress: Called with the seed and the step that begins; ``"kept"`` for a seed that was there.
    """
    start = time.perf_counter()
    device, settings = torch.device(device), settings or (QUICK if quick else FULL)
    methods, options = standard_methods(settings.budget), Options(batch_size=250)
    chosen = settings_of(methods, options, device, task="digits", quick=quick, **_own(settings))
    kept: list[int] = []

    def report_progress(seed: int, step: str) -> None:
        if step == "kept":
            kept.append(seed)
        progress(seed, step)

    with one_thread():
        records = run(
            Path(out), range(seed, seed + settings.n_seeds), lambda seed: digits(seed, settings), methods, options,
            settings=chosen, device=device, progress=report_progress,
        )  # fmt: skip
    summary = summarise(records)
    notice = (
        f"This was a quick run: {settings.n_seeds} seeds, {settings.epochs} epochs of training, fewer test data. Its "
        "errors are large, and it decides nothing. Run without --quick for results."
    )
    paths = write_outputs(
        out, summary, title="Debiased Laplace on digits", notice=notice if quick else "",
        pictures=[_examples(digits(seed, settings))],
    )  # fmt: skip
    return DemoResult(summary, paths, len(kept), time.perf_counter() - start)


def digits(seed: int, settings: DemoSettings = FULL) -> Task:
    """The digits task of one seed: its split, its network, its shifts.

    Args:
        seed: Seed of everything random.
        settings: Sizes and severities.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(raw / 16).float().view(-1, 1, 8, 8)
    targets = torch.from_numpy(labels).long()
    sizes = [
        round(fraction * len(labels))
        for fraction in (settings.train_fraction, settings.validation_fraction, settings.test_fraction)
    ]
    train, rest = train_test_split(range(len(labels)), train_size=sizes[0], stratify=labels, random_state=seed)
    sizes[2] = min(sizes[2], len(rest) - sizes[1])
    validation, test = train_test_split(
        rest, train_size=sizes[1], test_size=sizes[2], stratify=labels[rest], random_state=seed
    )
    inputs, known = images[test], targets[test]
    return Task(
        name="digits",
        description=(
            f"The 1,797 handwritten digits that come with scikit-learn, 8 x 8 grey pixels scaled to [0, 1], split anew "
            f"for each seed with equal shares of every class: {len(train)} to train on, {len(validation)} for "
            f"validation, {len(test)} to test on. The network has two convolutions, a batch normalisation and two "
            f"linear layers, and is trained with Adam for {settings.epochs} epochs. The mini-batch methods spend "
            f"{settings.budget} training data on curvature: few, where a bias would matter most."
        ),
        model=lambda device: trained_network(images[train], targets[train], seed, settings, device),
        train=lambda: _batches(images[train], targets[train]),
        validation=lambda: _batches(images[validation], targets[validation]),
        tests={
            TEST: (inputs, known),
            NOISE: (shifts.gaussian_noise(inputs, settings.noise, seed=seed), known),
            ROTATION: (shifts.rotate(inputs, settings.degrees), known),
        },
        ood={
            SHUFFLED: shifts.shuffle_patches(inputs, settings.patch, seed=seed),
            BLOBS: shifts.smooth_blobs(inputs, sigma=settings.blur, seed=seed),
        },
        n_data=len(train),
        seeds=(
            "A seed decides everything that is random: how the data are split, the training, the data drawn for the "
            "fits, the shifts. Splits of different seeds share data, so a standard error speaks about repetitions on "
            "these digits, not about other data."
        ),
        notes={
            TEST: "Test images as they are.",
            NOISE: f"Gaussian noise of standard deviation {settings.noise:g} added to every pixel, clipped to [0, 1].",
            ROTATION: f"Turned by {settings.degrees:g} degrees counter-clockwise, linear interpolation, black outside.",
            SHUFFLED: (
                f"No digits: each test image cut into patches of {settings.patch} x {settings.patch} pixels, put back "
                "in a random order. The strokes and the pixel values of a digit, without its shape."
            ),
            BLOBS: (
                f"No digits: white noise blurred with a standard deviation of {settings.blur:g} pixel, and the pixel "
                "values of a test image laid out in its order. The histogram of a digit in a smooth random pattern."
            ),
        },
    )


def network() -> nn.Module:
    """Two convolutions, a batch normalisation, two linear layers; 9,818 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def trained_network(
    images: Tensor, targets: Tensor, seed: int, settings: DemoSettings, device: torch.device
) -> nn.Module:
    """Initialise and train; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # initialisation draws from the CPU's global generator
        model = network()
        order = [torch.randperm(len(images)) for _ in range(settings.epochs)]
    model, images, targets = model.to(device), images.to(device), targets.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    with torch.enable_grad():
        for epoch in order:
            for batch in epoch.to(device).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), targets[batch]).backward()
                optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def resolve_device(name: str | None) -> torch.device:
    """A device that works: the named one, or CUDA if there is one and the CPU otherwise.

    Raises:
        ValueError: If the device does not exist here; it says which do.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"Expected a device out of {', '.join(available)}, got {name!r}.") from None
    return device


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one CPU thread: networks this small gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batches(images: Tensor, targets: Tensor) -> Iterator[Batch]:
    return zip(images.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True)


def _own(settings: DemoSettings) -> dict[str, Any]:
    """Settings that decide the numbers of one seed: how many seeds there are does not."""
    return {key: value for key, value in vars(settings).items() if key != "n_seeds"}


def _examples(task: Task) -> Picture:
    rows = {name: inputs for name, (inputs, _) in task.tests.items()} | dict(task.ood)
    return examples_picture(rows, "The first test images of the first seed, under every condition.")
