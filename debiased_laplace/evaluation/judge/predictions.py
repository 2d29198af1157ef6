"""One pass over the data of a condition: what every predictor says of them."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from debiased_laplace import _data
from debiased_laplace._arrays import Array
from debiased_laplace._ranks import Ranks, current
from debiased_laplace.evaluation.judge.conditions import Condition
from debiased_laplace.evaluation.judge.preflight import NO_DATA, Images, checked_targets, inputs_and_targets
from debiased_laplace.evaluation.predictors.prediction import Predictor, as_prediction
from debiased_laplace.evaluation.provenance import data_digest
from debiased_laplace.evaluation.scores import detection

T = TypeVar("T")

#: Inputs that are shown as the most uncertain ones.
N_SHOWN = 8


def predict(
    predictors: Mapping[str, Predictor], condition: Condition, highlight: str, images: Images | None
) -> dict[str, Any]:
    """What every predictor says of the data of a condition; one that fails is left out, with the reason.

    Several processes predict a shard each, and the first one gets all of it. A predictor that fails in one of them has
    failed.

    Args:
        predictors: Callables by name.
        condition: Its loader is read once.
        highlight: The predictor whose most uncertain inputs are kept, if ``images`` makes pictures of them.
        images: From inputs to images ``[N, channels, H, W]`` in [0, 1].

    Returns:
        ``arrays`` of each predictor, ``targets``, ``seconds``, ``shown``, the number of data ``n``, ``failed``, the
        digest of the ``first`` batch (of the first process) and its ``rows`` among the data.

    Raises:
        TypeError: If a batch is of no known kind.
        ValueError: If a batch is wrong, or all predictors fail.
    """
    what, ranks, shard = condition.described, current(), _data.Shard(condition.loader)
    parts: dict[str, list[dict[str, Array]]] = {name: [] for name in predictors}
    failed: dict[str, str] = {}
    seconds, labels, shown, first = dict.fromkeys(predictors, 0.0), list[Array](), list[dict[str, Any]](), ""
    sizes, n = list[int](), 0
    for number, batch in enumerate(_data.of_this_process(condition.loader, shard), 1):
        ranks.check()
        inputs, targets = inputs_and_targets(batch, f"{what}, batch {number}")
        size = _data.count(inputs)
        sizes.append(size)
        if not size:
            continue
        first = first or data_digest([(inputs, targets)])
        for name, predictor in predictors.items():
            if name in failed:
                continue
            start = time.perf_counter()
            try:
                parts[name].append(as_prediction(predictor(inputs), size, name).arrays())
            except Exception as error:
                failed[name] = f"batch {number}: {reason(error)}"
            seconds[name] += time.perf_counter() - start
        _check_some_work(failed, predictors, what)
        if condition.kind != "ood":
            predicted = next(parts[k][-1] for k in parts if k not in failed)
            targets = checked_targets(predicted, targets, f"{what}, batch {number}")
            labels.append(targets.cpu().numpy())
        if images is not None and condition.kind != "shift" and highlight not in failed:
            shown += _uncertain(parts[highlight][-1], inputs, targets, images, n)
            shown = _most_uncertain(shown)
        n += size
    every = ranks.gather((sizes, failed, seconds))
    for of_round in zip_longest(*(of_rank[0] for of_rank in every), fillvalue=0):
        shard.advance(of_round, ranks.rank)
    if ranks.size > 1:
        shard.check(ranks)
    if not shard.n_seen:
        raise ValueError(NO_DATA.format(what))
    failed = {name: why for _, of_rank, _ in reversed(every) for name, why in of_rank.items()}
    _check_some_work(failed, predictors, what)
    mine = shard.places
    places = ranks.to_first(mine)
    # The data in the order of all processes, if there are several.
    order = torch.cat(places).argsort().numpy() if len(places) > 1 else slice(None)

    def whole(of_batches: list[Array]) -> Array:
        return np.concatenate(of_batches)[order]

    arrays = {}
    for name in predictors:
        batches = [] if name in failed else _of_all(ranks, parts.pop(name))
        if batches:
            arrays[name] = {key: whole([part[key] for part in batches]) for key in batches[0]}
    labels = _of_all(ranks, labels)
    shown = _of_all(ranks, [one | {"index": int(mine[one["index"]])} for one in shown])
    return {
        "arrays": arrays, "targets": whole(labels) if labels else np.zeros(0, dtype=np.int64),
        "seconds": {name: max(of_rank[name] for *_, of_rank in every) for name in predictors},
        "shown": [] if highlight in failed else _most_uncertain(shown), "n": shard.n_seen, "failed": failed,
        "first": first, "rows": mine[: next(filter(None, sizes), 0)].tolist(),
    }  # fmt: skip


def _of_all(ranks: Ranks, values: list[T]) -> list[T]:
    """Lists of all processes as one, in the first process."""
    return [value for of_rank in ranks.to_first(values) for value in of_rank]


def _check_some_work(failed: Mapping[str, str], predictors: Mapping[str, Predictor], what: str) -> None:
    if len(failed) == len(predictors):
        raise ValueError(f"Nothing can be predicted on {what}; {'; '.join(f'{k}: {v}' for k, v in failed.items())}")


def _most_uncertain(shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(shown, key=lambda one: -one["score"])[:N_SHOWN]


def reason(error: Exception) -> str:
    """Why something failed, in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _uncertain(
    arrays: Mapping[str, Array], inputs: Any, targets: Tensor, images: Images, offset: int
) -> list[dict[str, Any]]:
    """The most uncertain data of a batch, with their pictures."""
    if "probabilities" not in arrays:
        return []
    probabilities = arrays["probabilities"]
    scores = detection.ood_score(probabilities)
    chosen = np.argsort(-scores)[:N_SHOWN]
    pictures = images(_data.take(inputs, torch.from_numpy(chosen.copy()))).cpu()
    return [
        {
            "index": offset + int(index), "score": float(scores[index]), "target": _label(targets[int(index)]),
            "predicted": int(probabilities[index].argmax()), "confidence": float(probabilities[index].max()),
            "image": _png(picture),
        }
        for index, picture in zip(chosen, pictures, strict=True)
    ]  # fmt: skip


def _label(target: Tensor) -> int:
    """A class; -1 for what is none, as targets of out-of-distribution data may be."""
    return -1 if target.ndim or target.is_floating_point() else int(target)


def _png(image: Tensor) -> str:
    """A picture in base64."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
