"""What a record is made from: settings, networks and data, and their digests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from debiased_laplace._ranks import current
from debiased_laplace.evaluation import records
from debiased_laplace.evaluation.judge.predictions import reason
from debiased_laplace.evaluation.methods import Method, Options
from debiased_laplace.evaluation.provenance import data_digest, network_digest, seeded
from debiased_laplace.evaluation.suite.data import check_task, loader_of
from debiased_laplace.evaluation.tasks import Context, Task

_READ = ("train_loader", "val_loader", "test_loader")


def settings_of(task: Task, methods: Sequence[Method], options: Options, context: Context) -> dict[str, Any]:
    """What decides the numbers of all seeds alike: task file, methods, options, software; JSON's types."""
    settings = {
        "methods": [
            {"name": m.name, "kind": m.kind, "fit": m.fit_key, "tune": m.tune, "role": m.role} for m in methods
        ],
        "options": vars(options),
    }
    return base_settings(task, context) | records.jsonable(settings)


def base_settings(task: Task, context: Context) -> dict[str, Any]:
    """What decides numbers whatever is measured: the task file, the kind of device, the software; JSON's types."""
    return {
        "sources": task.fingerprint or task.source,  # of no file: all there is to tell
        "quick": context.quick,
        "device": context.device.type,
        "software": records.versions(),
    }


@dataclass(frozen=True)
class Subject:
    """What one seed is about: the networks, as they are now, and what is known of the data.

    Attributes:
        model: The network.
        members: Of the ensemble, if one is asked for; or why there is none.
        n_outputs: Classes, or outputs of a regression.
        about: What the record says of the task.
        target_scale: Of a regression.
        inputs: Digests of all that the numbers of this seed depend on beyond the settings.
        seconds: How long it took to get the network.
    """

    model: nn.Module
    members: list[nn.Module] | str
    n_outputs: int
    about: dict[str, Any]
    target_scale: float
    inputs: dict[str, Any]
    seconds: float

    @classmethod
    def of(cls, task: Task, context: Context, methods: Sequence[Method], options: Options) -> Subject:
        """Load the network, check the data against it, and take the digests.

        Raises:
            TaskError: If something of the task fails; it says which function.
        """
        start, ranks = time.perf_counter(), current()
        model = ranks.after_first(lambda: task.model(context))
        seconds = time.perf_counter() - start
        members: list[nn.Module] | str = []
        if any(method.kind == "ensemble" for method in methods):
            members = ranks.after_first(partial(_members, task, context))
        with seeded(context.seed):
            n_outputs, first = check_task(task, model, context, options)
        data = {}
        for name in _READ:
            with seeded(context.seed):
                data[name] = data_digest(loader_of(task, name, context, n_outputs))
        about = {
            "name": task.name, "description": task.description(context), "likelihood": task.likelihood,
            "budget": task.budget, "seeds_note": task.constant("SEEDS_NOTE", ""),
            "notes": dict(task.constant("NOTES", {})), "classes": list(task.constant("CLASSES", [])),
            "n_outputs": n_outputs, "independent_seeds": bool(task.constant("INDEPENDENT_SEEDS", False)),
            "folds": int(task.constant("FOLDS", 1)),
            "n_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }  # fmt: skip
        target_scale = float(task.call("target_scale", context)) if task.has("target_scale") else 1.0
        inputs = {
            "network": network_digest(model),
            "ensemble": members if isinstance(members, str) else [network_digest(member) for member in members],
            "data": data | first,
            "about": records.digest(about | {"n_data": task.n_data, "target_scale": target_scale}),
        }
        ranks.agree("evaluate", {key: repr(value) for key, value in inputs.items()})
        return cls(model, members, n_outputs, about, target_scale, inputs, seconds)


def _members(task: Task, context: Context) -> list[nn.Module] | str:
    try:
        return [member.to(context.device).eval() for member in task.call("ensemble", context)]
    except Exception as error:
        return reason(error)
