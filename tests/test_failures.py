"""Nothing computed is lost: methods that fail, data that are wrong late, scores that are infinite or undefined."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from debiased_laplace import DebiasedLaplace
from debiased_laplace.cli import app
from debiased_laplace.evaluation import Context, Method, Options, Task, TaskError, records, run
from debiased_laplace.evaluation.methods import methods_of
from debiased_laplace.evaluation.predictors.one_logit import TwoClasses, two_classes
from debiased_laplace.evaluation.predictors.posterior import LaplacePredictor
from debiased_laplace.evaluation.predictors.prediction import as_prediction
from debiased_laplace.evaluation.report.figures import pictures
from debiased_laplace.evaluation.report.numbers import number, plus_minus, with_interval
from debiased_laplace.evaluation.report.outputs import markdown, render, write_outputs
from debiased_laplace.evaluation.report.reliability import reliability_pictures
from debiased_laplace.evaluation.report.statement import statement
from debiased_laplace.evaluation.report.summary import summarise
from debiased_laplace.evaluation.report.tables import tables
from debiased_laplace.evaluation.report.verdicts import judged
from debiased_laplace.evaluation.scores import weighted
from debiased_laplace.evaluation.scores.cells import combine
from debiased_laplace.evaluation.scores.replicates import Replicates
from debiased_laplace.evaluation.suite import bench, distances
from debiased_laplace.evaluation.suite.posteriors import Posteriors
from debiased_laplace.evaluation.tasks import watched
from tests.tolerances import EXACT, FLOAT32

pytestmark = pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")  # little data
TASKS = Path(__file__).parent / "tasks"
OPTIONS = Options(grid_size=5, log_prior_prec_min=-2, log_prior_prec_max=4, n_resamples=10)
MAP = (Method("MAP", "map"),)
DEBIASED = (*MAP, Method("debiased K-FAC", fit={"budget": 24}, role="candidate"))


def task_of(folder: Path, *replacements: tuple[str, str], name: str = "blobs") -> Task:
    """A task with parts of its file replaced."""
    text = (TASKS / f"{name}.py").read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (folder / "task.py").write_text(text)
    return Task.load(folder / "task.py")


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("out of\neverything")


def judged_blobs(folder: Path, methods: tuple[Method, ...], *replacements: tuple[str, str]) -> dict[str, Any]:
    (record,) = run(task_of(folder, *replacements), folder, [0], Context(), methods=methods, options=OPTIONS)
    (file,) = (folder / "records").iterdir()
    assert repr(records.read_record(file, {})) == repr(json.loads(json.dumps(record)))
    return record


# -- methods that fail -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("temperature", "bench.tuned_temperature"), ("ensemble", ""), ("laplace", "posteriors.fit"),
        ("laplace", "posteriors.Laplace.tune"), ("laplace", "bench.LaplacePredictor"),
        ("laplace", "bench.LaplacePredictor.__call__"), ("laplace-torch", "bench.fitted_peer"),
        ("map", "bench.outputs_of"),
    ],
)  # fmt: skip
def test_a_method_that_fails_is_a_row_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    broken = Method("broken", kind, laplace={"structure": "kron"} if kind == "laplace-torch" else {})  # type: ignore[arg-type]
    sound = Method("sound", "map" if kind != "map" else "temperature")
    changes = [] if place else [("def train_loader", "def ensemble():\n    1 / 0\n\n\ndef train_loader")]
    if place == "bench.outputs_of":
        monkeypatch.setattr(bench.Bench, "_check_outputs", lambda self: None)
    if place:
        monkeypatch.setattr(f"debiased_laplace.evaluation.suite.{place}", fails)
    record = judged_blobs(tmp_path, (sound, broken), *changes)
    why = record["predictors"]["broken"]["failed"]
    assert "ZeroDivisionError: division by zero" in why if not place else "RuntimeError: out of everything" in why
    assert list(record["test"]["scores"]) == ["sound"]
    summarised = summarise([record])
    assert any(
        sentence.startswith("broken did not run: ") and why in sentence for sentence in statement(summarised)["details"]
    )
    first = tables(summarised)[0]
    assert [row[:2] for row in first.sections[0][1]][1] == ["broken", "failed"]
    assert why in first.caption and why in markdown(summarised, title="t")


@pytest.mark.parametrize("failing", ["single-batch K-FAC", "debiased K-FAC", "full-data K-FAC"])
def test_everything_is_written_whichever_posterior_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    original = Posteriors.of
    monkeypatch.setattr(
        Posteriors, "of", lambda self, method: fails() if method.name == failing else original(self, method)
    )
    task = task_of(tmp_path)
    methods = tuple(method for method in methods_of(task) if method.role or method.kind in ("map", "temperature"))
    (record,) = run(task, tmp_path, [0], Context(), methods=methods, options=OPTIONS)
    summarised = summarise([record])
    assert failing not in summarised["test"]["scores"] and len(summarised["test"]["scores"]) == 5
    assert bool(summarised["distances"]) == (failing != "full-data K-FAC")
    assert f"{failing} did not run: RuntimeError: out of everything." in statement(summarised)["details"]
    assert markdown(summarised, title="t")
    if failing == "debiased K-FAC":
        assert statement(summarised)["answer"] == "The tables show each method by itself: debiased K-FAC did not run."


def test_a_method_that_fails_on_some_data_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LaplacePredictor.__call__

    def call(self: LaplacePredictor, inputs: Any) -> Any:
        return fails() if float(inputs.abs().max()) > 15 else original(self, inputs)

    monkeypatch.setattr(LaplacePredictor, "__call__", call)
    record = judged_blobs(tmp_path, DEBIASED)
    about = record["predictors"]["debiased K-FAC"]
    assert "failed" not in about
    assert any(text.startswith("It failed on the ood data 'far', batch 1: RuntimeError") for text in about["warnings"])
    assert math.isfinite(record["test"]["scores"]["debiased K-FAC"]["nll"][0])
    assert math.isnan(record["ood"][0]["scores"]["debiased K-FAC"]["entropy, auroc"][0])
    assert math.isfinite(record["ood"][0]["scores"]["MAP"]["entropy, auroc"][0])
    summarised = summarise([record])
    (ood,) = [table for table in tables(summarised) if table.title == "Out-of-distribution data"]
    assert "undefined" in ood.markdown()
    assert render(summarised, reliability_pictures(summarised), title="t")


def test_distances_that_fail_take_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "functional_moments", fails)
    methods = (*DEBIASED, Method("all", fit={"budget": None}, role="reference"))
    record = judged_blobs(tmp_path, methods)
    assert record["distances"] == {}
    assert (
        record["predictors"]["all"]["warnings"][-1] == "No distances could be measured: RuntimeError: out of everything"
    )
    assert len(record["test"]["scores"]) == 3


# -- data that are wrong late ----------------------------------------------------------------------

LATE = {
    "raises": "1 / 0",
    "has no targets": "batch = batch[:1]",
    "has a label of no class": "batch = (batch[0], batch[1] + 9)",
}
WHY = {"raises": "ZeroDivisionError", "has no targets": "tuple of length 1", "has a label of no class": "from 0 to 2"}
RETURNS = {
    "train_loader": "return cut(*data(100 + seed, 100))", "val_loader": "return cut(*data(200 + seed, 60))",
    "test_loader": "return cut(*data(300, 70))",
}  # fmt: skip


@pytest.mark.parametrize("what", LATE)
@pytest.mark.parametrize("name", RETURNS)
def test_a_late_batch_that_is_wrong_names_the_function(tmp_path: Path, name: str, what: str) -> None:
    call = RETURNS[name].removeprefix("return ").replace("cut(*", "").removesuffix(")")
    late = (
        f"x, y = {call}\n    for number, batch in enumerate(zip(x.split(8), y.split(8)), 1):\n"
        f"        if number == 7:\n            {LATE[what]}\n        yield batch"
    )
    with pytest.raises(TaskError, match=rf"^{name}\(\) of .*task.py: .*batch 7.*{WHY[what]}"):
        judged_blobs(tmp_path, DEBIASED, (RETURNS[name], late))


def test_late_shifted_and_out_of_distribution_data_name_the_function_and_what_they_are(tmp_path: Path) -> None:
    head = "def late(batches):\n    yield from batches[:2]\n    raise OSError('gone')\n\n\n"
    for old, name, title in (
        ("s: cut(inputs + torch.tensor([0.4 * s, 0.0]), targets)", "shifted_loaders", "'moved' 1"),
        ("cut(6 * inputs, targets)", "ood_loaders", "'far'"),
    ):
        call = old.removeprefix("s: ")
        changes = [(old, old.replace(call, f"late({call})")), ("def shifted_loaders", f"{head}def shifted_loaders")]
        with pytest.raises(TaskError, match=rf"^{name}\(\) of .*task.py, {title}: batch 3: OSError: gone"):
            # A folder for each: files of one size, written in the same second, would share their compiled module.
            (tmp_path / name).mkdir()
            judged_blobs(tmp_path / name, MAP, *changes)


def test_outputs_that_are_not_finite_name_the_validation_data(tmp_path: Path) -> None:
    change = (
        "return cut(*data(200 + seed, 60))",
        "x, y = data(200 + seed, 60)\n    x[37] = torch.inf\n    return cut(x, y)",
    )
    with pytest.raises(TaskError, match=r"val_loader\(\) of .*: batch 2: Expected finite outputs .*for datum 37\."):
        judged_blobs(tmp_path, MAP, change)


def test_inputs_that_nothing_can_be_predicted_for_name_the_test_data(tmp_path: Path) -> None:
    change = ("return cut(*data(300, 70))", "x, y = data(300, 70)\n    x[69] = torch.nan\n    return cut(x, y)")
    with pytest.raises(
        TaskError, match=r"^test_loader\(\) of .*: Nothing can be predicted on .*; MAP: batch 3: .*datum 5\."
    ):
        judged_blobs(tmp_path, MAP, change)


@pytest.mark.parametrize("command", ["evaluate", "fit", "bias"])
def test_the_commands_say_it_in_one_line(tmp_path: Path, command: str) -> None:
    old = RETURNS["train_loader"]
    task_of(tmp_path, (old, f"yield from {old.removeprefix('return ')}[:3]\n    raise OSError('gone')"))
    out = tmp_path / ("p.safetensors" if command == "fit" else "out")
    arguments = [command, str(tmp_path / "task.py"), "--quick", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "train_loader() of" in result.stderr and "task.py: batch 4: OSError: gone" in " ".join(result.stderr.split())


def test_watched_loaders_are_what_they_were() -> None:
    class Stream:
        batch_size = 3

        def __iter__(self) -> Any:
            return iter([1, 2])

    stream, listed, once = (watched(loader, "mine") for loader in (Stream(), [1, 2], iter([1, 2])))
    assert (list(stream), list(stream), stream.batch_size) == ([1, 2], [1, 2], 3)
    assert (list(listed), len(listed)) == ([1, 2], 2)
    assert not hasattr(stream, "__len__")
    assert iter(once) is once and list(once) == [1, 2] and list(once) == []
    assert watched(None, "mine") is None
    assert list(copy.copy(listed)) == [1, 2]
    with pytest.raises(TaskError, match=r"^mine: batch 2: ValueError: no$"):
        list(watched([1, 2], "mine", lambda batch: batch if batch < 2 else (_ for _ in ()).throw(ValueError("no"))))


# -- scores that are infinite or undefined ---------------------------------------------------------

ZERO = (
    (
        "nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 3)",
        "nn.Linear(2, 12, bias=False), nn.Tanh(), nn.Linear(12, 3, bias=False)",
    ),
    ("return cut(*data(300, 70))", "x, y = data(300, 70)\n    x[4] = 0\n    return cut(x, y)"),
)


def test_a_variance_of_zero_is_at_no_distance_from_zero(tmp_path: Path) -> None:
    """No biases and an empty input: every posterior is certain, and there is no difference between them."""
    methods = (*DEBIASED, Method("all", fit={"budget": None}, role="reference"))
    task = task_of(tmp_path, *ZERO)
    (record,) = run(task, tmp_path, [0], Context(), methods=methods, options=OPTIONS)
    inputs = task.definition.data(300, 70)[0]
    logarithms = {}
    for method in methods[1:]:
        la = DebiasedLaplace(task.model(Context()), "classification", seed=0)
        la.fit(task.call("train_loader", Context()), generator=0, **method.fit)
        la.prior_precision = 1.0
        variances = la._glm_predictive_distribution(inputs)[1].diagonal(dim1=1, dim2=2).double()
        variances[4] = 1.0
        logarithms[method.name] = variances.log()
    expected = (logarithms["debiased K-FAC"] - logarithms["all"]).abs().mean()
    assert record["distances"]["equal"]["debiased K-FAC"]["absolute"][0] == pytest.approx(float(expected), rel=1e-3)


def test_one_variance_of_zero_is_infinitely_far() -> None:
    ratio = distances.log_ratio(
        torch.tensor([0.0, 0.0, 2.0, 2.0]).double(), torch.tensor([0.0, 1.0, 0.0, 1.0]).double()
    )
    assert ratio.tolist() == [0.0, -math.inf, math.inf, pytest.approx(math.log(2), rel=EXACT)]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.lists(st.sampled_from([0.5, -2.0, math.inf, -math.inf, math.nan]), min_size=1, max_size=5))
@example([math.inf, -math.inf])
@example([math.nan, math.inf])
def test_means_of_resamples_follow_from_their_values(values: list[float]) -> None:
    weights = weighted.resample_weights(len(values), 12, 0)
    seen: list[Replicates] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "cell", lambda score: (seen.append(score), [score.value])[1])
        distances.mean_cell(torch.tensor(values, dtype=torch.float64), weights)
    with np.errstate(invalid="ignore"):
        drawn = [np.mean(np.repeat(values, row.astype(int))) for row in weights]
        assert seen[0].value == pytest.approx(float(np.mean(values)), rel=EXACT, nan_ok=True)
    assert seen[0].replicates.tolist() == pytest.approx(drawn, rel=EXACT, nan_ok=True)


CELLS = st.tuples(*[st.sampled_from([0.1, -0.2, 0.0, math.inf, -math.inf, math.nan])] * 4).map(list)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(CELLS, min_size=1, max_size=4), st.booleans())
def test_cells_of_several_seeds_can_be_combined(cells: list[list[float]], same: bool) -> None:
    result = combine(cells, same)
    assert len(result) == 4
    values = [cell[0] for cell in cells]
    if len(cells) > 1 and not np.isfinite(values).all():
        with np.errstate(invalid="ignore"):
            assert result[0] == pytest.approx(np.mean(values), nan_ok=True)
    for text in (plus_minus(result, 3), with_interval(result, 3), number(result[0], 2, sign=True, scale=100)):
        assert "inf " not in text and "nan" not in text
    assert judged("nll", result) in ("better", "worse", "negligible", "no difference shown", "not defined")
    assert (judged("nll", result) == "not defined") == math.isnan(result[0])


def test_numbers_that_are_none_are_said() -> None:
    minus = "\N{MINUS SIGN}"
    assert number(math.inf, 3) == "infinite" and number(-math.inf, 3, sign=True) == f"{minus}infinite"
    assert plus_minus([math.inf, math.inf, 0.5, math.inf], 2) == "infinite"
    assert with_interval([math.inf, math.inf, 0.5, math.inf], 2) == "infinite [+0.50, infinite]"
    assert with_interval([math.nan, math.inf, -math.inf, math.inf], 2) == "undefined"
    assert judged("nll", [math.inf, math.inf, 0.5, math.inf]) == "worse"
    assert combine([[math.inf, math.inf, 0.5, math.inf], [1.0, 0.1, 0.8, 1.2]], True) == [
        math.inf,
        math.inf,
        0.5,
        math.inf,
    ]
    # all seeds say so
    assert judged("nll", combine([[math.inf, math.inf, 0.5, math.inf], [0.3, 0.1, 0.2, 0.4]], True)) == "worse"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    task = Task.load(TASKS / "blobs.py")
    methods = tuple(m for m in methods_of(task) if m.role or m.kind in ("map", "temperature"))
    (result,) = run(task, tmp_path_factory.mktemp("all"), [0], Context(), methods=methods, options=OPTIONS)
    return result


def spoiled(record: dict[str, Any], value: float, which: Callable[[str, str], bool]) -> dict[str, Any]:
    """The cells of some methods and scores with another value."""
    changed = copy.deepcopy(record)
    entries = [changed["test"], *changed["shifts"], *changed["ood"]]
    for entry in entries:
        for scores in [entry["scores"], *entry["differences"].values()]:
            for name, cells in scores.items():
                for score in cells:
                    if which(name, score):
                        cells[score] = [value, math.inf, -math.inf, math.inf]
    for scores in changed["distances"].values():
        for name, cells in scores.items():
            if name != "prior_precision" and which(name, "nll"):
                scores[name] = {part: [value, math.inf, -math.inf, math.inf] for part in cells}
    for name, about in changed["predictors"].items():
        if which(name, "nll") and "curve" in about:
            about["curve"]["losses"][::2] = [value] * len(about["curve"]["losses"][::2])
            about["validation_nll"] = value
    return changed


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("several", [False, True])
def test_sentences_and_tables_of_such_scores(record: dict[str, Any], value: float, several: bool) -> None:
    for which in (
        lambda name, score: True, lambda name, score: name == "debiased K-FAC", lambda name, score: name == "MAP",
        lambda name, score: score == "nll",
    ):  # fmt: skip
        changed = spoiled(record, value, which)
        summarised = summarise([changed, {**record, "seed": 1}] if several else [changed])
        text = markdown(summarised, title="t")
        assert ("undefined" if math.isnan(value) else "infinite") in text
        assert not {"nan", "inf", "-inf", "inf,"} & set(
            text.replace("|", " ").replace("(", " ").replace("[", " ").split()
        )
        json.dumps(records.encode(summarised), allow_nan=False)


def test_pages_and_figures_of_such_scores(record: dict[str, Any], tmp_path: Path) -> None:
    """All of one posterior undefined and of another infinite; and figures where nothing is finite."""
    changed = spoiled(record, math.nan, lambda name, score: name == "debiased K-FAC")
    summarised = summarise([spoiled(changed, math.inf, lambda name, score: name == "single-batch K-FAC")])
    paths = write_outputs(tmp_path, summarised)
    assert all(path.stat().st_size for path in paths.values())
    page = paths["report.html"].read_text()
    assert "not drawn where they are not: NLL of single-batch K-FAC on moved" in page
    assert "infinite" in page and "undefined" in page
    assert repr(records.read_json(paths["results.json"])["test"]["scores"]) == repr(summarised["test"]["scores"])
    assert pictures(summarise([spoiled(record, math.inf, lambda name, score: True)]))


# -- one logit -------------------------------------------------------------------------------------

LOGIT = """
import torch
from torch import nn
LIKELIHOOD = "bernoulli"
BUDGET = 24
CLASSES = ("no", "yes")
def data(n, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g)
    return [(x, (x[:, :1] + 0.7 * torch.randn(n, 1, generator=g) > 0).float())]
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(net.parameters(), 3e-2)
    (x, y), = data(100, 0)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(x), y).backward()
        optimizer.step()
    return net
def ensemble(): return [model(), model()]
def train_loader(): return data(100, 0)
def val_loader(): return data(60, 1)
def test_loader(): return data(70, 2)
def shifted_loaders(): return {"s": [(x + 1, y) for x, y in data(70, 2)]}
def ood_loaders(): return {"f": [(9 * x, y) for x, y in data(70, 2)]}
"""


def test_one_logit_is_judged_like_two_classes(tmp_path: Path) -> None:
    """The same network with the outputs 0 and f, a softmax, and class indices: equal scores of every method."""
    (tmp_path / "one.py").write_text(LOGIT)
    two = LOGIT.replace('"bernoulli"', '"classification"').replace("def model():", "def network():")
    two = two.replace("> 0).float())]", "> 0)[:, 0].long())]").replace(
        "nn.functional.binary_cross_entropy_with_logits(net(x), y)",
        "nn.functional.binary_cross_entropy_with_logits(net(x), y[:, None].float())",
    ) + (
        "class Two(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.net = network()\n"
        "    def forward(self, x):\n        f = self.net(x)\n        return torch.cat([torch.zeros_like(f), f], 1)\n"
        "def model(): return Two()\n"
    )
    (tmp_path / "two.py").write_text(two)
    result = []
    for name in ("one", "two"):
        task = Task.load(tmp_path / f"{name}.py")
        (record,) = run(task, tmp_path / name, [0], Context(), options=OPTIONS)
        assert not [about["failed"] for about in record["predictors"].values() if "failed" in about]
        result.append(record)
    assert list(result[0]["test"]["scores"]) == [m.name for m in methods_of(Task.load(tmp_path / "one.py"))]
    for part in ("test", "shifts", "ood"):
        pairs = [[record[part]] if part == "test" else record[part] for record in result]
        for one, other in zip(*pairs, strict=True):
            for name, scores in one["scores"].items():
                for score in ("nll", "brier", "accuracy", "entropy, auroc", "maximum probability, auroc"):
                    if score in scores and name not in ("debiased K-FAC", "debiased, layers", "single-batch K-FAC"):
                        # those draw data by curvature, which rounds differently
                        assert scores[score][0] == pytest.approx(other["scores"][name][score][0], rel=2e-3, abs=1e-6), (
                            name
                        )


def test_probabilities_of_one_logit_keep_their_digits() -> None:
    torch.manual_seed(0)
    net = nn.Linear(2, 1).double()
    x = torch.tensor([[200.0, 240.0], [-200.0, -240.0], [0.1, 0.2]]).double()
    y = torch.tensor([1.0, 0.0, 1.0])
    la = DebiasedLaplace(net, "bernoulli")
    la.fit([(x, y)])
    la.prior_precision = 1e6
    for link in ("probit", "mc"):
        la.link = link
        mean, one = net(x)[:, 0].detach(), as_prediction(LaplacePredictor(la)(x), 3, "la").probabilities
        assert one is not None and one.shape == (3, 2)
        assert one[:, 1] == pytest.approx(la(x, link_approx=link)[:, 0].double(), rel=FLOAT32)
        if link == "probit":
            variance = la._glm_predictive_distribution(x)[1][:, 0, 0].double()
            expected = torch.sigmoid(-mean / (1 + math.pi / 8 * variance).sqrt())
            assert one[:, 0] == pytest.approx(expected, rel=FLOAT32)
        assert float(one.min()) > 0


def test_targets_and_networks_of_one_logit_are_checked(tmp_path: Path) -> None:
    for targets in (torch.tensor([0, 1, 1]), torch.tensor([[0.0], [1.0], [1.0]]), torch.tensor([False, True, True])):
        _, labels = two_classes((torch.zeros(3, 2), targets))
        assert labels.tolist() == [0, 1, 1] and labels.dtype == torch.int64
    for targets in (torch.tensor([0.3, 1, 1]), torch.tensor([2, 1, 1]), torch.tensor([math.nan, 1, 1])):
        with pytest.raises(ValueError, match="Expected targets 0 and 1, got others between"):
            two_classes((torch.zeros(3, 2), targets))
    with pytest.raises(ValueError, match=r"Expected targets \[N\] or \[N, 1\] of 3 data, got shape \(3, 2\)"):
        two_classes((torch.zeros(3, 2), torch.zeros(3, 2)))
    with pytest.raises(ValueError, match=r"Expected a network with one output .*got \[3, 2\]"):
        TwoClasses(nn.Identity())(torch.zeros(3, 2))
    (tmp_path / "soft.py").write_text(LOGIT.replace("> 0).float())]", "> 0).float() * 0.9)]"))
    with pytest.raises(
        TaskError, match=r"train_loader\(\) of .*soft.py: batch 1: ValueError: Expected targets 0 and 1"
    ):
        run(Task.load(tmp_path / "soft.py"), tmp_path, [0], Context(), methods=MAP, options=OPTIONS)
    (tmp_path / "named.py").write_text(LOGIT.replace('"bernoulli"', '"classification"'))
    with pytest.raises(TaskError, match=r'at least two classes.*LIKELIHOOD of a task file is "bernoulli"'):
        run(Task.load(tmp_path / "named.py"), tmp_path, [0], Context(), methods=MAP, options=OPTIONS)


@pytest.mark.usefixtures("undrawn")
def test_one_logit_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(LOGIT)

    def invoke(*arguments: object) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result

    invoke(
        "evaluate", tmp_path / "one.py", "--quick", "--out", tmp_path / "e", "--only", "debiased K-FAC", "--only", "MAP"
    )
    invoke("bias", tmp_path / "one.py", "--quick", "--out", tmp_path / "b")
    invoke("fit", tmp_path / "one.py", "--out", tmp_path / "p.safetensors")
    invoke("predict", tmp_path / "one.py", tmp_path / "p.safetensors", "--out", tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz") as stored:
        assert stored["probabilities"].shape == (70, 2)
        right = stored["probabilities"].argmax(1) == stored["targets"].ravel()
    assert right.mean() > 0.7
