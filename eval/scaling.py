"""What several processes save and what they send: measured with one and two here, and on paper for more.

    python eval/scaling.py [--only paper measured] [--quick] [--out scaling-results] [--docs docs]

Paper: from the block sizes of ResNet-50 and ViT-B/16 (1,000 classes, 224 x 224), how the eigendecompositions of a
default fit are dealt to 1 to 1,024 processes, by the cube of their size, and how many bytes a process receives. No
process was started for it. Measured: whole fits of a ResNet-20 with random weights by one and by two processes with
one thread each, which take turns; seconds, and the bytes that are handed to gloo. What is complete is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench import hardware
from documents import markdown, show
from scale import large

import debiased_laplace as dl
from debiased_laplace._ranks import Group, Ranks
from debiased_laplace.evaluation.records import read_json, write_json
from debiased_laplace.evaluation.shipped.cifar10 import CifarResNet
from debiased_laplace.network.network import Network

SIZES = (1, 2, 4, 8, 16, 64, 256, 1024)

#: Folds of the default split, with the data that belong to all of them; data of the default budget; bytes of an image.
FOLDS, PARTS, BUDGET, IMAGE = 4, 5, 1024, 3 * 224 * 224 * 4

#: Of the fits that are measured.
N_DATA, BATCH, REPETITIONS = 2048, 64, 3


class Some(Ranks):
    """So many processes, of which there are none."""

    def __init__(self, size: int) -> None:
        self.size = size


def on_paper(name: str) -> dict[str, Any]:
    """Work and bytes of a default fit, from the blocks of the network."""
    network = Network.discover(large(name), torch.randn(3, 3, 224, 224))
    a, b = [], []  # sizes of the matrices that are decomposed
    for block in network.blocks:
        if block.kind.rotates_outputs:
            b += [block.outputs] * block.groups
            a += [block.inputs] * block.groups if block.kind.rotates_inputs else []
    matrices = [*a, *b * (FOLDS + 1)]  # A is the same in every round
    numbers_a, numbers_b = sum(size**2 for size in a), sum(size**2 for size in b)
    result: dict[str, Any] = {"parameters": network.n_params, "largest": max(matrices), "matrices": len(matrices)}
    for size in SIZES:
        owners = Some(size).owners([float(one) ** 3 for one in matrices])
        loads = [0.0] * size
        for owner, one in zip(owners, matrices, strict=True):
            loads[owner] += float(one) ** 3
        ring = 2 * (size - 1) / size  # of a ring, every process receives each number that often
        others = (size - 1) / size
        result[str(size)] = {
            "largest_share": max(loads) / sum(loads),
            "imbalance": max(loads) * size / sum(loads),
            "sums": 4 * ring * (numbers_a + PARTS * numbers_b),
            "curvatures": 4 * ring * network.n_params * (PARTS + FOLDS),
            "vectors": 4 * others * sum(one**2 for one in matrices),
            "data": others * BUDGET * IMAGE,
        }
    return result


def fit_once(n_data: int) -> dict[str, Any]:
    """In every process: a whole fit of its shard, with what was handed to gloo."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model, sent = CifarResNet().eval(), 0
    x, y = torch.randn(n_data, 3, 32, 32), torch.randint(10, (n_data,))
    several = "RANK" in os.environ
    if several:
        torch.distributed.init_process_group("gloo")
        original = Group.gather, Group.sum, Group.broadcast

        def gather(self: Group, value: Any, device: Any = None) -> Any:
            nonlocal sent
            results = original[0](self, value, device)
            sent += sum(p.numel() * p.element_size() for p in tensors_in(value))
            return results

        def total(self: Group, tensor: torch.Tensor) -> torch.Tensor:
            nonlocal sent
            sent += tensor.numel() * tensor.element_size()
            return original[1](self, tensor)

        def broadcast(self: Group, tensor: torch.Tensor, source: int) -> torch.Tensor:
            nonlocal sent
            sent += tensor.numel() * tensor.element_size() * (source == self.rank)
            return original[2](self, tensor, source)

        Group.gather, Group.sum, Group.broadcast = gather, total, broadcast  # type: ignore[assignment, method-assign]
    dataset = torch.utils.data.TensorDataset(x, y)
    sampler: Any = torch.utils.data.DistributedSampler(dataset, shuffle=False) if several else None
    size = int(os.environ.get("WORLD_SIZE", "1"))
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH // size, sampler=sampler)
    start = time.perf_counter()
    dl.fit(model, loader, "classification", sampler=dl.PrioritySampler(256))
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    with torch.no_grad():
        for part in x[: n_data // 2].split(BATCH):
            model(part)
    return {"seconds": seconds, "forward": 2 * (time.perf_counter() - start), "sent": sent}


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of nested containers."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [found for one in value.values() for found in tensors_in(one)]
    if isinstance(value, (list, tuple)):
        return [found for one in value for found in tensors_in(one)]
    return []


def measured(size: int, quick: bool = False) -> dict[str, Any]:
    """A fit by so many processes: the first one's numbers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port)}
    processes = []
    for rank in range(size):
        of_rank = {"RANK": str(rank), "WORLD_SIZE": str(size)} if size > 1 else {}
        command = [sys.executable, __file__, "--one", *["--quick"] * quick]
        processes.append(subprocess.Popen(command, env=environment | of_rank, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("A process failed.")
    return dict(json.loads(outputs[0].strip().splitlines()[-1]))


def paper_table(record: dict[str, Any]) -> str:
    """One row for each number of processes."""
    rows = []
    for name, result in record["paper"].items():
        for size in SIZES:
            one = result[str(size)]
            received = [one[key] for key in ("sums", "vectors", "curvatures", "data")]
            rows.append([
                f"{name}, {result['parameters'] / 1e6:.1f} million", f"{size:,}", f"{100 * one['largest_share']:.1f} %",
                f"{one['imbalance']:.2f}", *(f"{value / 1e9:.2f}" for value in received), f"{sum(received) / 1e9:.2f}",
            ])  # fmt: skip
    columns = ["network, parameters", "processes", "largest share of the decompositions", "of the mean",
               "sums, GB", "eigenvectors", "curvatures", "data", "in all"]  # fmt: skip
    return markdown(columns, rows)


def measured_table(record: dict[str, Any]) -> str:
    """One row for each number of processes."""
    alone = record["measured"]["1"]
    unit, whole = (median(one[key] for one in alone) for key in ("forward", "seconds"))
    rows = []
    for size in ("1", "2"):
        runs = record["measured"][size]
        seconds = median(one["seconds"] for one in runs)
        sent = f"{runs[0]['sent'] / 1e6:.0f} MB" if size != "1" else ""
        rows.append([size, f"{seconds / unit:.1f}", f"{whole / seconds:.2f}", sent])
    return markdown(
        ["processes", "fit, in forward passes of all data by one process", "times faster", "given to gloo"], rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scaling-results"))
    parser.add_argument("--docs", type=Path, help="put the record and the tables there; otherwise they are printed")
    parser.add_argument("--quick", action="store_true", help="one network, and fits of 256 data, once")
    parser.add_argument("--only", nargs="+", default=["paper", "measured"], choices=["paper", "measured"])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(fit_once(256 if options.quick else N_DATA)))
        return
    path = options.out / "scaling.json"
    record = read_json(path) if path.exists() else {"paper": {}, "measured": {}}
    record |= {"hardware": hardware("cpu"), "torch": torch.__version__}
    for name in ("ResNet-50", "ViT-B/16")[: 1 if options.quick else 2] if "paper" in options.only else ():
        record["paper"][name] = on_paper(name)
        write_json(path, record)
    for turn in range((1 if options.quick else REPETITIONS) if "measured" in options.only else 0):
        for size in (1, 2):
            runs = record["measured"].setdefault(str(size), [])
            if len(runs) <= turn:
                runs.append(measured(size, options.quick))
                write_json(path, record)
    tables = {"paper": paper_table(record)} if record["paper"] else {}
    tables |= {"measured": measured_table(record)} if record["measured"] else {}
    if options.docs is not None:
        shutil.copy(path, options.docs / "records")
    show(tables, options.docs and options.docs / "distributed.md")


if __name__ == "__main__":
    main()
