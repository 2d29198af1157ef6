"""Fixtures: the devices present, tiny data, and one thread, so that numbers do not depend on the machine."""

from __future__ import annotations

import gc
import io
import os

# Before anything reads them: tests run in as many processes as there are CPUs, and so do those that they start.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from debiased_laplace.evaluation.bias import pictures as bias_pictures
from debiased_laplace.evaluation.report import figures, reliability
from tests.virtual_card import CARD, VirtualCard

torch.set_num_threads(1)

# Nothing here has to survive a loss of power. Tests that look at what is written when put their own in its place.
os.fsync = lambda file: None

#: The files that take longest come first, so that no process is left with one of them at the end.
LONGEST = ("eval", "shipped", "online", "drop_in", "bias", "instruments", "tuning", "evaluation", "suite", "demo")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=[*DEVICES, *(["card"] if os.environ.get("VIRTUAL_CARD") else [])])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device present, and on demand a card that is not there; all of these have float64."""
    if request.param == "card":
        with VirtualCard():
            yield CARD
    else:
        yield torch.device(request.param)


@pytest.fixture
def second_device() -> torch.device:
    if len(DEVICES) == 1:
        pytest.skip("there is one device only")
    return torch.device(DEVICES[1])


def pytest_configure(config: pytest.Config) -> None:
    """Torch's remarks on its own speed are no concern of these tests."""
    for message in ("Using padding='same' with even kernel", "There is a performance drop"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish() -> None:
    """What was imported and collected stays: it is not looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and pictures without the drawing, for tests that do not look at figures."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    for module in (figures, reliability, bias_pictures):
        monkeypatch.setattr(module, "png", lambda figure: file.getvalue())
