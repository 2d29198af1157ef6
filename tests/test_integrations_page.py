"""The page about integrations."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

from tests.documented import DOCS, code_of, executed
from tests.tolerances import FLOAT32, assert_equal


def test_it_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(code_of(DOCS / "integrations.md")) == 6
    torch.manual_seed(0)
    names = executed(DOCS / "integrations.md", __name__="page")
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
