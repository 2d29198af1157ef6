"""Fixtures: the devices present, tiny data, and one thread, so that numbers do not depend on the machine."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device present; all of these have float64."""
    return torch.device(request.param)


@pytest.fixture
def second_device() -> torch.device:
    if len(DEVICES) == 1:
        pytest.skip("there is one device only")
    return torch.device(DEVICES[1])


def pytest_configure(config: pytest.Config) -> None:
    """Torch's remarks on its own speed are no concern of these tests."""
    for message in ("Using padding='same' with even kernel", "There is a performance drop"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:UserWarning")
