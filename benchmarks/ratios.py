"""The history of costs, commit by commit: our own sides of ``eval/bench.py``, in units that machines share.

    pip install asv
    asv run --config benchmarks/asv.conf.json --python=same --set-commit-hash $(git rev-parse HEAD)
    asv publish --config benchmarks/asv.conf.json && asv preview --config benchmarks/asv.conf.json

Every number is a ratio to a forward pass, gradient or prediction measured in the same process, or the growth of the
memory of a fresh process: seconds of different days are not comparable.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "eval"))

import bench

#: Cases that take seconds and have a unit.
CASES = {
    f"{what} {name} {n}": (what, name, n, side, min(repetitions, 3))
    for what, name, n, sides, _ in bench.CASES
    for side, repetitions in sides[:1]
    if (what, name) in {("variance", "LeNet"), ("variance", "ResNet-20"), ("classes", "EfficientNet"),
                        ("grid", "LeNet"), ("stream", "LeNet"), ("statistics", "LeNet"), ("diagonal", "LeNet")}
}  # fmt: skip


class Costs:
    """One case of the benchmarks."""

    params = tuple(CASES)
    param_names = ("case",)
    timeout = 600

    def setup_cache(self) -> dict[str, dict[str, object]]:
        """Every case once, in a fresh process each."""
        return {case: bench.run_one(*settings, "cpu") for case, settings in CASES.items()}

    def track_time(self, measured: dict[str, dict[str, list[float]]], case: str) -> float:
        """Median time over the median of the unit."""
        return median(measured[case]["seconds"]) / median(measured[case]["unit_seconds"])

    def track_memory(self, measured: dict[str, dict[str, float]], case: str) -> float:
        """Growth of the process to its peak."""
        return measured[case]["memory_mb"]

    setup_cache.timeout = 1800
    track_time.unit = "units"
    track_memory.unit = "MB"
