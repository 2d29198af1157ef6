"""The page about integrations."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import debiased_laplace as dl
from tests.tolerances import FLOAT32, assert_equal


def test_it_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(dl.__file__).parents[1] / "docs" / "integrations.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    names: dict[str, Any] = {"__name__": "page"}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks:
            exec(compile(block, "integrations.md", "exec"), names)
    assert names["classifier"].score(names["x_test"], names["y_test"]) > 0.9
    assert names["mean"].shape == names["deviation"].shape == (5,)
    assert names["trainer"].model.config.num_labels == 2
    assert float(names["error"]) == pytest.approx(names["same"], rel=1e-6)
    expected = names["posterior"].predict(names["features"][200:])
    assert_equal(names["served"]["probabilities"], expected.probabilities, FLOAT32)
    session = onnxruntime.InferenceSession("posterior.onnx")
    (served,) = session.run(["logits_variance"], {"features": names["features"][200:].numpy()})
    assert_equal(torch.from_numpy(served), expected.logits_variance, FLOAT32)
    assert Path("posterior.safetensors").exists()
