"""Speed and memory beside laplace-torch, from one run on one machine.

    python eval/bench.py [--device cuda] [--only lenet] [--again] [--quick] [--out folder] [--docs docs]

Every measurement is a fresh process that builds its network, warms up once, and repeats; processes of
the sides that are compared take turns. Reported are medians, ratios of medians, and the growth of peak
memory (resident set, or the card's) over the process before the measured call. Networks have random
weights: cost does not depend on them. A case is written when it is complete; a run that was
interrupted goes on after it, and ``--again`` measures everything anew. The file runs itself as the process that
measures one side, so that both halves stay together.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import inspect
import io
import json
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import vit
from networks import all_cnn_c, cifar_3c3d, lenet, wide_head
from torch import Tensor, nn

from debiased_laplace.evaluation.shipped.cifar10 import CifarResNet


def resnet50() -> nn.Module:
    """The ResNet-50 of torchvision with random weights, 25.6 million parameters, 1,000 classes."""
    import torchvision

    return torchvision.models.resnet50(weights=None)


def resnet18() -> nn.Module:
    """The ResNet-18 of torchvision with random weights, 11.2 million parameters, 10 classes."""
    import torchvision

    return torchvision.models.resnet18(weights=None, num_classes=10)


def efficientnet() -> nn.Module:
    """The smallest EfficientNet of timm with random weights, 0.36 million parameters, 1,000 classes."""
    import timm

    return timm.create_model("test_efficientnet", num_classes=1000)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "LeNet": (lenet, (1, 28, 28), 10),
    "3C3D": (cifar_3c3d, (3, 32, 32), 10),
    "Head": (wide_head, (64,), 3100),
    "All-CNN-C": (functools.partial(all_cnn_c, 100), (3, 32, 32), 100),
    "ViT": (vit.network, (1, 28, 28), 10),
    "ResNet-20": (CifarResNet, (3, 32, 32), 10),
    "ResNet-18": (resnet18, (3, 64, 64), 10),
    "EfficientNet": (efficientnet, (3, 32, 32), 1000),
    "ResNet-50": (resnet50, (3, 224, 224) if torch.cuda.is_available() else (3, 64, 64), 1000),
}

#: What is compared: (what, network, number of data, [(side, repetitions)], target in words).
CASES: list[tuple[str, str, int, list[tuple[str, int]], str]] = [
    ("predict", "LeNet", 64, [("ours", 15), ("laplace curvlinops", 3), ("laplace backpack", 3)],
     "100 times faster and a tenth of the memory of its default; 15 times faster than BackPACK"),
    ("predict", "All-CNN-C", 4, [("ours", 3), ("ours, 30 linearised samples", 5), ("laplace curvlinops", 1),
     ("laplace backpack", 1)],
     "exact: 12 times faster, a quarter of the memory; linearised samples: 30 times"),
    ("variance", "LeNet", 64, [("ours", 25)], "1.5 times C backward passes"),
    ("variance", "ResNet-20", 64, [("ours", 5)], "3 times C backward passes"),
    ("variance", "EfficientNet", 1, [("ours", 3)], "1,000 outputs of one image: a fifth of C backward passes"),
    ("classes", "EfficientNet", 4, [("ours", 5), ("ours, 30 linearised samples", 3)],
     "the default with 1,000 classes: 60 forward passes of the same inputs"),
    ("grid", "LeNet", 500, [("ours", 5)], "100 prior precisions cost 3 times one prediction"),
    ("stream", "ResNet-20", 2000, [("ours", 3)], "1.5 forward passes over the same data"),
    ("stream", "ResNet-20", 8000, [("ours", 1)], "1.5 forward passes over the same data"),
    ("stream", "LeNet", 2000, [("ours", 9)], "1.5 forward passes over the same data"),
    ("stream", "ViT", 2000, [("ours", 3)], "1.5 forward passes over the same data"),
    ("statistics", "LeNet", 128, [("ours exact", 31), ("ours one sample", 31), ("laplace curvlinops", 9),
     ("laplace backpack", 9)], "4 gradients exact, 2 with one sample"),
    ("statistics", "ResNet-20", 64, [("ours exact", 5), ("ours one sample", 5), ("laplace curvlinops", 1),
     ("laplace backpack", 1)], "8 gradients exact; laplace-torch cannot"),
    ("eigenpairs", "LeNet", 128, [("ours", 9), ("vivit", 5), ("backpack", 5)], "beside ViViT's package and BackPACK"),
    ("eigenpairs", "3C3D", 32, [("ours", 5), ("vivit", 3), ("backpack", 3)], "beside ViViT's package and BackPACK"),
    ("largest batch", "LeNet", 0, [("ours", 1), ("vivit", 1), ("backpack", 1)],
     "top eigenpairs within 4 GB: twice the batch of theirs"),
    ("largest batch", "3C3D", 0, [("ours", 1), ("vivit", 1), ("backpack", 1)],
     "top eigenpairs within 4 GB: twice the batch of theirs"),
    ("low rank", "LeNet", 64, [("ours", 15), ("laplace lowrank", 1)], "prediction with 20 directions"),
    ("low rank", "3C3D", 64, [("ours", 5)], "prediction with 20 directions"),
    ("diagonal", "LeNet", 128, [("ours", 31), ("laplace curvlinops", 5), ("laplace backpack", 9)], "laplace-torch's"),
    ("diagonal", "3C3D", 64, [("ours", 7), ("laplace curvlinops", 2), ("laplace backpack", 5)], "laplace-torch's"),
    ("last layer", "Head", 32, [("ours", 9), ("laplace curvlinops", 1)], "one second and 1 GB"),
    ("fit", "ResNet-18", 256, [("ours", 1), ("ours, double precision", 1), ("ours, factors of at most 2,048", 1)],
     "64 of 256 data drawn: 3 times its decompositions done once; these half of those in double precision"),
    ("whole fit", "ResNet-50", 64 if torch.cuda.is_available() else 8, [("ours one sample", 1)],
     "statistics and eigendecompositions fit and run on one GPU (images of 224 x 224; 64 x 64 on a CPU)"),
]  # fmt: skip


#: Batches to try for the largest one. After one that takes longer than PATIENCE no larger one is tried: eigenvectors of
#: a whole Gram matrix take minutes.
BATCHES = {
    "LeNet": (256, 512, 768, 1024, 2048, 4096),
    "3C3D": (16, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024),
}
PATIENCE = 60.0

#: Data in a batch of the pass over a stream.
STREAM_BATCH = 128


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def memory_status(field: str) -> float:
    """A field of the process status, VmRSS (now) or VmHWM (peak), in MB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return float(line.split()[1]) / 1e3


def reset_peak(device: str) -> float:
    """Forget the peak of the memory so far (Linux, or the card's allocator); returns what is in use, in MB."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    Path("/proc/self/clear_refs").write_text("5")
    return memory_status("VmRSS")


def peak_memory(device: str) -> float:
    """Peak memory of this process since the reset, in MB."""
    return torch.cuda.max_memory_allocated() / 1e6 if device != "cpu" else memory_status("VmHWM")


def timed(function: Callable[[], Any], device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def laplace_model(side: str, model: nn.Module, stochastic: bool) -> Any:
    import laplace
    from laplace.curvature import BackPackGGN, CurvlinopsGGN

    backend = BackPackGGN if "backpack" in side else CurvlinopsGGN
    kwargs = {"stochastic": True} if stochastic else None
    structure = "lowrank" if "lowrank" in side else "diag" if "diagonal" in side else "kron"
    return laplace.Laplace(model, "classification", "all", structure, backend=backend, backend_kwargs=kwargs)


def theirs_eigenpairs(side: str, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """Top ten eigenpairs of the GGN by ViViT's package, or by hand from BackPACK's square root of it."""
    from backpack import backpack, extend
    from backpack.extensions import SqrtGGNExact

    extend(model)
    loss = extend(nn.CrossEntropyLoss())
    if side == "vivit":
        from vivit.linalg.eigh import EighComputation

        # ViViT 1.0.0 calls a function that torch has removed; this is its replacement.
        torch.Tensor.symeig = lambda matrix, eigenvectors=False: torch.linalg.eigh(matrix)  # type: ignore[method-assign]

        def with_vivit() -> Any:
            computation = EighComputation(warn_small_eigvals=0.0)
            group = {"params": list(model.parameters()), "criterion": lambda v: list(range(len(v) - 10, len(v)))}
            hook = computation.get_extension_hook([group])
            with backpack(computation.get_extension(), extension_hook=hook):
                loss(model(x), y).backward()
            return computation.get_result(group)

        return with_vivit

    def with_backpack() -> Any:
        with backpack(SqrtGGNExact()):
            loss(model(x), y).backward()
        gram = sum(
            torch.einsum("cnp,dmp->cndm", root, root)
            for p in model.parameters() for root in [p.sqrt_ggn_exact.flatten(2)]
        ).flatten(2).flatten(0, 1)  # fmt: skip
        values, vectors = torch.linalg.eigh(gram)
        top, values = vectors[:, -10:], values[-10:]
        pairs = (
            values,
            [(top / values.sqrt()).mT @ p.sqrt_ggn_exact.flatten(2).flatten(0, 1) for p in model.parameters()],
        )
        for p in model.parameters():
            del p.sqrt_ggn_exact
        return pairs

    return with_backpack


def prepare(
    what: str, side: str, model: nn.Module, x: Tensor, y: Tensor
) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """The call to measure, and the one whose time is the unit of it (None if there is none)."""
    from torch.utils.data import DataLoader, TensorDataset

    n_outputs = int(y.max()) + 1

    def curvature_data(network: Any, x: Tensor, y: Tensor, mc_samples: int | None = None) -> Any:
        weights = torch.full((len(x),), 1 / len(x), dtype=torch.float64)
        return CurvatureData(
            network, WeightedData(x, y, weights, torch.arange(len(x))), Categorical(), mc_samples=mc_samples
        )

    def gradient() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    def backward_passes() -> None:
        outputs = model(x)
        for c in range(outputs.shape[1]):
            torch.autograd.grad(outputs[:, c].sum(), list(model.parameters()), retain_graph=True)

    def forward_pass() -> None:
        with torch.no_grad():
            for part in x.split(STREAM_BATCH):
                model(part)

    if side in ("vivit", "backpack"):
        return theirs_eigenpairs(side, model, x, y), None
    if side.startswith("laplace"):
        if what == "diagonal":
            la = laplace_model(f"{side} diagonal", model, stochastic=False)
            loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
            return lambda: la.fit(loader), gradient
        if what == "last layer":
            import laplace

            la = laplace.Laplace(model, "classification", "last_layer", "kron", backend_kwargs={"stochastic": True})
            la.fit(DataLoader(TensorDataset(x, y), batch_size=len(x)))
            return lambda: la(x), None
        if what == "statistics":
            la = laplace_model(side, model, stochastic=False)
            return lambda: la.backend.kron(x, y, N=len(x)), gradient
        la = laplace_model(side, model, stochastic=n_outputs > 32)
        la.fit(DataLoader(TensorDataset(x[:8], y[:8]), batch_size=8))
        return lambda: la(x), None

    from debiased_laplace import Categorical, DebiasedLaplace, UniformSampler
    from debiased_laplace.curvature.structures import Diagonal, Kronecker, LowRank
    from debiased_laplace.fitting.fit import fit
    from debiased_laplace.network.gradients import CurvatureData
    from debiased_laplace.network.network import Network
    from debiased_laplace.posterior.predictive import functional_moments
    from debiased_laplace.sampling.sample import WeightedData

    if what in ("eigenpairs", "largest batch"):
        network = Network.discover(model, x)
        data = curvature_data(network, x, y)

        def eigenpairs() -> Any:
            statistics = LowRank(10).measure(network, data)
            basis = LowRank(10).eigenbasis(network, statistics)
            return statistics.curvatures(basis), basis

        return eigenpairs, None
    if what == "diagonal":
        fit_diagonal = functools.partial(
            fit, model, [(x, y)], Categorical(), structure=Diagonal(), sampler=UniformSampler(None)
        )
        return fit_diagonal, gradient
    if what == "low rank":
        fitted = fit(model, [(x[:16], y[:16])], Categorical(), structure=LowRank(20))
        return lambda: functional_moments(fitted.network, fitted.posterior, x), backward_passes
    if what == "last layer":
        fitted = fit(model, [(x, y)], Categorical(), parameters="last_layer", mc_samples=1)
        return lambda: functional_moments(fitted.network, fitted.posterior, x, covariance=False), None
    if what == "fit":
        return whole_fit(side, model, list(zip(x.split(64), y.split(64), strict=True)))
    if what == "stream":
        from debiased_laplace.fitting.stream import Stream

        network = Network.discover(model, x)

        def whole_pass() -> None:
            stream = Stream(lambda *_: network, Categorical(), Kronecker())
            for inputs, targets in zip(x.split(STREAM_BATCH), y.split(STREAM_BATCH), strict=True):
                stream(inputs, targets)

        return whole_pass, forward_pass
    if what == "statistics":
        network = Network.discover(model, x)
        data = curvature_data(network, x, y, 1 if "one sample" in side else None)
        return lambda: Kronecker().measure(network, data), gradient
    la = DebiasedLaplace(model, "classification")
    if what == "whole fit":
        return lambda: la.fit([(x, y)], mc_samples=1), None
    la.fit([(x[:8], y[:8])], mc_samples=1 if what == "classes" else "auto")
    if what == "grid":
        return lambda: la.optimize_prior_precision(method="gridsearch", val_loader=[(x, y)]), lambda: la(x)
    if what == "variance":
        return lambda: functional_moments(la.network, la.posterior, x), backward_passes
    unit = torch.no_grad()(lambda: model(x)) if what == "classes" else None
    if "linearised" in side:
        return lambda: la(x, pred_type="linearized", n_samples=30), unit
    return lambda: la(x, link_approx="probit"), unit


def whole_fit(side: str, model: nn.Module, loader: list[tuple[Tensor, Tensor]]) -> tuple[Callable[[], Any], Any]:
    """A default fit with 64 data drawn, and the decompositions of all matrices of it, each done once."""
    from debiased_laplace import Kronecker, PrioritySampler, fit
    from debiased_laplace.curvature.structures import kron

    options: dict[str, Any] = {"eigh_dtype": torch.float64} if "double" in side else {}
    options |= {"max_factor": 2048} if "2,048" in side else {}
    decompose, calls, seen = inspect.unwrap(kron.eigenvectors), [], set()

    @functools.wraps(decompose)
    def noted(moments: Any, *settings: Any) -> Any:
        new = [(one, name) for one, name in zip(moments, settings[0], strict=True) if id(one.known) not in seen]
        seen.update(id(one.known) for one, _ in new)
        calls.append((new, settings[1:]))
        return decompose(moments, *settings)

    def fitted() -> Any:
        calls.clear()
        seen.clear()
        return fit(model, loader, "classification", structure=Kronecker(**options), sampler=PrioritySampler(64))

    def decompositions() -> None:
        for of_call, settings in calls:
            decompose([type(one)(one.values) for one, _ in of_call], [name for _, name in of_call], *settings)

    kron.eigenvectors = noted  # type: ignore[attr-defined]
    return fitted, decompositions


def measure(what: str, name: str, n: int, side: str, repetitions: int, device: str) -> dict[str, Any]:
    """One fresh process: seconds of every repetition, of its unit, and memory growth."""
    warnings.filterwarnings("ignore")
    build, shape, n_classes = NETWORKS[name]
    torch.manual_seed(0)
    model = build().to(device).eval()
    x = torch.randn(n, *shape, device=device)
    y = torch.arange(n, device=device) % n_classes
    y[-1] = n_classes - 1
    call, unit = prepare(what, side, model, x, y)
    synchronise(device)
    before = reset_peak(device)
    first = timed(call, device)
    memory = peak_memory(device) - before
    if repetitions == 1 and unit is None:
        return {"seconds": [first], "memory_mb": memory, "process_mb": peak_memory(device)}
    if unit is not None:
        unit()
    seconds, units = [], []
    for _ in range(repetitions):
        seconds.append(timed(call, device))
        if unit is not None:
            units.append(timed(unit, device))
    return {"seconds": seconds, "unit_seconds": units, "memory_mb": memory, "process_mb": peak_memory(device)}


def run_one(what: str, name: str, n: int, side: str, repetitions: int, device: str) -> dict[str, Any]:
    """In a fresh process; on a card, whose memory torch counts and which takes seconds to begin with, in this one."""
    if device == "cpu":
        return run_process(["--one", what, name, str(n), side, str(repetitions)])
    try:
        return measure(what, name, n, side, repetitions, device)
    except Exception as error:  # whatever a side fails with
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def run_process(arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def largest_batch(name: str, side: str, device: str) -> dict[str, Any]:
    """The largest of some batches whose top eigenpairs take at most 4 GB, with its time and memory."""
    best: dict[str, Any] = {"error": "not even the smallest batch"}
    for n in BATCHES[name]:
        result = run_process(["--device", device, "--one", "largest batch", name, str(n), side, "1"])
        if "error" in result or result["memory_mb"] > 4096:
            break
        why = "the largest that was tried" if n == BATCHES[name][-1] else ""
        if result["seconds"][0] > PATIENCE:
            why = f"took {result['seconds'][0]:.0f} s; larger ones were not tried"
        best = {**result, "batch": n, "why": why}
        if result["seconds"][0] > PATIENCE:
            break
    return best


def hardware(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    return f"{torch.get_num_threads()} threads of {cpu}"


def report(records: list[dict[str, Any]]) -> str:
    """A Markdown table, one row for each side."""
    lines = [
        "| what | side | median time | in units | against ours | memory growth |",
        "|---|---|---|---|---|---|",
    ]
    units = {
        "statistics": "gradients",
        "diagonal": "gradients",
        "low rank": "C backward passes",
        "variance": "C backward passes",
        "classes": "forward passes",
        "grid": "single predictions",
        "stream": "forward passes",
        "fit": "times its decompositions",
    }
    for record in records:
        ours = record["sides"][0][1]
        for side, result in record["sides"]:
            what = f"{record['what']}, {record['network']}, {result.get('batch', record['n'])} inputs"
            if "error" in result:
                lines.append(f"| {what} | {side} | fails: {result['error'][:110]} | | | |")
                continue
            if "batch" in result:
                largest = f" ({result['why']})" if result["why"] else ""
                cells = f"| batch of {result['batch']}{largest} | | | {result['memory_mb']:.0f} MB |"
                lines.append(f"| {record['what']}, {record['network']} | {side} {cells}")
                continue
            seconds = median(result["seconds"])
            unit = ""
            if result.get("unit_seconds"):
                unit = f"{seconds / median(result['unit_seconds']):.2f} {units[record['what']]}"
            against = (
                ""
                if result is ours
                else f"{seconds / median(ours['seconds']):.1f} x time, "
                f"{result['memory_mb'] / max(ours['memory_mb'], 1):.1f} x memory"
            )
            lines.append(f"| {what} | {side} | {seconds:.4f} s | {unit} | {against} | {result['memory_mb']:.0f} MB |")
        lines.append(f"| | *wanted: {record['target']}* | | | | |")
    return "\n".join(lines)


def figure(records: list[dict[str, Any]], path: Path) -> None:
    """How many times as long as ours every other side takes."""
    from documents import save_small
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [
        (f"{record['what']}, {record['network']}: {side}", median(result["seconds"]) / median(ours["seconds"]))
        for record in records if record["what"] != "largest batch"
        for ours in [record["sides"][0][1]] if "seconds" in ours
        for side, result in record["sides"][1:] if "seconds" in result and not side.startswith("ours")
    ]  # fmt: skip
    drawn = Figure(figsize=(8, 0.8 + 0.34 * len(bars)), layout="constrained")
    axes = drawn.subplots()
    names, ratios = zip(*reversed(bars), strict=True)
    axes.barh(names, ratios, color="0.55")
    axes.bar_label(axes.containers[0], [f" {ratio:.3g}" for ratio in ratios])  # type: ignore[arg-type]
    axes.axvline(1, color="black")
    axes.set(xscale="log", xlabel="time, in times of ours", xlim=(min(0.5, *ratios) / 1.5, max(ratios) * 3))
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    FigureCanvasAgg(drawn).print_png(image)
    save_small(image.getvalue(), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", default=[""], help="run the cases that have any of these in their name")
    parser.add_argument("--again", action="store_true", help="measure cases that have a record anew")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes for each side")
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    parser.add_argument("--docs", type=Path, help="put the record, the table and on a CPU the figure into this folder")
    parser.add_argument("--quick", action="store_true", help="one case, once")
    parser.add_argument(
        "--one", nargs=5, metavar=("WHAT", "NETWORK", "N", "SIDE", "REPETITIONS"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.one:
        what, name, n, side, repetitions = options.one
        print(json.dumps(measure(what, name, int(n), side, int(repetitions), options.device)))
        return
    if options.quick:
        options.only, options.rounds = ["diagonal LeNet"], 1
    known_cases = [f"{what} {name} {n}" for what, name, n, *_ in CASES]
    if not any(part.lower() in case.lower() for part in options.only for case in known_cases):
        parser.error(f"expected --only to be part of one of {known_cases}, got {options.only!r}")
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "laplace-torch", "curvlinops-for-pytorch", "backpack-for-pytorch", "vivit-for-pytorch")
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"bench-{options.device}.json"
    here: dict[str, Any] = {"hardware": hardware(options.device), "versions": versions}
    known_records: dict[str, Any] = {}
    if path.exists() and not options.again:
        kept = json.loads(path.read_text())
        if {key: kept[key] for key in here} != here:
            parser.error(f"{path} has records of {kept['hardware']}, {kept['versions']}; name another --out or --again")
        known_records = {f"{record['what']} {record['network']} {record['n']}": record for record in kept["records"]}
    for what, name, n, sides, target in CASES:
        case = f"{what} {name} {n}"
        if not any(part.lower() in case.lower() for part in options.only) or case in known_records:
            continue
        results = measure_case(what, name, n, sides, options)
        known_records[case] = {"what": what, "network": name, "n": n, "target": target, "sides": list(results.items())}
        records = [known_records[key] for key in known_cases if key in known_records]
        path.with_suffix(".part").write_text(json.dumps(here | {"records": records}, indent=1))
        path.with_suffix(".part").replace(path)
    records = [known_records[key] for key in known_cases if key in known_records]
    where = f"{here['hardware']}; " + ", ".join(f"{name} {version}" for name, version in versions.items())
    table = f"{where}\n\n{report(records)}"
    path.with_suffix(".md").write_text(table + "\n")
    if options.docs is not None:
        from documents import fill

        shutil.copy(path, options.docs / "records")
        fill(options.docs / "benchmarks.md", {"cpu" if options.device == "cpu" else "card": report(records)})
        if options.device == "cpu":
            figure(records, options.docs / "benchmarks.png")
    print(table)


def measure_case(
    what: str, name: str, n: int, sides: list[tuple[str, int]], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Every side in fresh processes that take turns."""
    results: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for side, repetitions in sides:
            known = results.get(side, {})
            if "error" in known or (repetitions == 1 and known):
                continue
            if what == "largest batch":
                result = largest_batch(name, side, options.device)
            else:
                result = run_one(what, name, n, side, repetitions, options.device)
            print(f"{what} {name} {side}: {result.get('error') or median(result['seconds'])}", file=sys.stderr)
            if known:  # medians over all repetitions of all processes
                for key in ("seconds", "unit_seconds"):
                    result[key] = known.get(key, []) + result.get(key, [])
                result["memory_mb"] = max(result["memory_mb"], known["memory_mb"])
            results[side] = result
    return results


if __name__ == "__main__":
    main()
