"""What ``eval/paper.py`` measures, against the package's own quadratics and against autograd."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves as leaves

from debiased_laplace import Quadratic
from debiased_laplace.evaluation.records import read_json
from tests.documented import generated
from tests.test_eval import script
from tests.tolerances import EXACT
from tests.virtual_card import CARD, VirtualCard

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def eval_modules():
    """The scripts' modules, which are forgotten afterwards: their names are anybody's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "eval")
        before = set(sys.modules)
        import paper_kfac
        import paper_measure
        import paper_networks

        yield paper_networks, paper_measure, paper_kfac
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == ROOT / "eval":
                del sys.modules[name]


def test_the_document_is_made_and_parts_are_kept(tmp_path):
    docs, out = tmp_path / "docs", tmp_path / "out"
    docs.mkdir()
    names = ("networks", *(f"figure {i}" for i in range(1, 6)), "kfac", "kfac differences")
    (docs / "paper.md").write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in names))
    arguments = ("paper.py", "--networks", "digits", "--quick", "--device", "cpu", "--out", str(out))
    done = script(*arguments, "--seconds", "0")
    assert done.stdout.count("No time for digits") == 3
    done = script(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" s in all") == 3
    assert " s in all" not in script(*arguments).stdout
    done = script("paper.py", "--document", "--out", str(out), "--docs", str(docs))
    assert done.returncode == 0, done.stderr
    whole, record = read_json(out / "paper.json")["digits"], read_json(docs / "records" / "paper.json")["digits"]
    assert "figures" not in record["directions"]
    assert record["kfac"] == whole["kfac"]
    first = record["figure5"]["sizes"]["32"]["two batches"]
    assert first["train loss, best"] == [
        min(run["train"]["loss"]) for run in whole["figure5"]["sizes"]["32"]["two batches"]
    ]
    filled = generated(docs / "paper.md")
    assert set(filled) == set(names)
    assert all(content.count("\n") >= 2 for content in filled.values())
    overstated = whole["directions"]["sizes"]["16"]["typical_ratio_own"]["value"]
    row = filled["figure 2"].splitlines()[2].split("|")
    assert float(row[4].split("±")[0]) == pytest.approx(overstated, rel=0.1)
    assert {path.name for path in docs.glob("*.png")} == {f"paper-{name}.png" for name in (1, 2, "sizes", 3, 4, 5)}


class Attention(nn.Module):
    """A class token, positions, one layer of a Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(1).unflatten(1, (-1, 8))], 1)
        return self.head(self.encoder(tokens)[:, 0])


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


@pytest.fixture(params=[convolutions, Attention])
def problem(request):
    torch.manual_seed(0)
    return request.param().double().eval(), (torch.randn(24, 1, 8, 8).double(), torch.randint(3, (24,)))


def test_quadratics_of_any_data_are_those_of_the_package(eval_modules, problem):
    _, measure, _ = eval_modules
    model, (x, y) = problem
    whole = Quadratic(model, (x, y), "classification")
    rows = torch.randn(5, whole.n_params, generator=torch.Generator().manual_seed(1)).double()
    network = measure.Network.discover(model, x)
    quadratics = measure.Quadratics(*(lambda f, z: (f, y, z))(*measure.output_changes(network, x, rows, 7)))
    some = torch.tensor([3, 1, 20, 7, 8])
    for index, reference in ((None, whole), (some, Quadratic(model, (x[some], y[some]), "classification"))):
        for found, expected in zip(quadratics.along(slice(1, 4), index), reference.projected(rows[1:4]), strict=True):
            torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
        assert quadratics.loss(index) == pytest.approx(reference.loss, rel=EXACT)


def test_eigenvectors_are_those_of_the_package(eval_modules, problem):
    _, measure, _ = eval_modules
    model, batch = problem
    values, rows = measure.eigenvectors(model, batch, 4, 5)
    expected, vectors = Quadratic(model, batch, "classification").eigenpairs(4)
    torch.testing.assert_close(values, expected, rtol=EXACT, atol=0)
    torch.testing.assert_close((rows @ vectors.mT).abs(), torch.eye(4).double(), rtol=0, atol=1e-6)


def test_the_record_is_that_of_the_instruments(eval_modules, problem):
    """Ratios, planes and steps, against quadratics that are made for each of them."""
    from debiased_laplace.quadratic.instruments import alignment, directional_bias, plane

    networks, measure, _ = eval_modules
    model, data = problem
    trained = networks.Trained("", model, data, data, {})
    extent = measure.Extent((4, 6), 6, 3, 2, 3, 3, (), 1, 24, 1e4)
    found = measure.Directions(trained, extent)
    record = found.record()
    whole = Quadratic(model, data, "classification")
    for size in extent.sizes:
        batches = [Quadratic(model, measure.take(trained, index), "classification") for index in found.index[size]]
        bias = directional_bias(batches, whole, 2, population=24)
        of_size = record["sizes"][str(size)]
        for name in ("ratio_own", "typical_ratio_own", "typical_ratio_other", "total_ratio_own"):
            expected = getattr(bias.curvatures, name)
            assert of_size[name]["value"] == pytest.approx(expected.value.tolist(), rel=1e-5)
            assert of_size[name]["error"] == pytest.approx(expected.error.tolist(), rel=1e-4)
        assert of_size["slopes_data"]["value"] == pytest.approx(1 / float(bias.slopes.total_ratio_own.value), rel=1e-4)
        assert of_size["uphill"] == int((bias.slopes.reference > 0).sum())
        spans = [batch.eigenpairs(2)[1] for batch in batches]
        others = [alignment(a, b).row_sums.mean() for a in spans for b in spans if a is not b]
        assert of_size["within_span"]["value"] == pytest.approx(float(sum(others)) / 6, rel=1e-6)
        for run, batch in zip(of_size["steps"], batches, strict=True):
            path = measure.descent(batch, 3)
            slopes, curvatures = path.measure(*whole.projected(path.directions))
            assert run["own"] == pytest.approx(path.step_sizes.tolist(), rel=1e-6)
            assert run["data"] == pytest.approx((-slopes / curvatures).tolist(), rel=1e-4)
            assert run["uphill"] == int((slopes > 0).sum())
    for drawn, batch in zip(record["figures"]["planes"], batches, strict=True):
        expected = plane(batch, whole)
        for name, on in (("batch", expected.first), ("data", expected.reference)):
            assert drawn[name]["offset"] == pytest.approx(on.offset, rel=EXACT)
            measured = torch.tensor(drawn[name]["curvatures"]).double()
            torch.testing.assert_close(measured.diagonal(), on.curvatures.diagonal(), rtol=1e-5, atol=0)
            assert drawn[name]["step"] == pytest.approx(float(on.minimum.norm()), rel=1e-4)
    figure = record["figures"]["directions"]["curvatures"]
    of_third = batches[2].curvature(batches[1].eigenpairs(3)[1]).tolist()
    assert figure["batches"][1][2] == pytest.approx(of_third, rel=1e-5)
    overlaps = alignment(batches[0].eigenpairs(3)[1], batches[2].eigenpairs(3)[1]).overlaps
    torch.testing.assert_close(
        torch.tensor(record["figures"]["alignment"][0][2]).double(), overlaps, rtol=1e-5, atol=1e-7
    )


def test_figure_5_follows_the_loss_and_leaves_the_network(eval_modules, problem):
    networks, measure, _ = eval_modules
    model, data = problem
    before = [p.clone() for p in model.parameters()]
    trained = networks.Trained("", model, data, data, {})
    record = measure.figure5(trained, measure.Extent(steps_sizes=(8,), n_batches=2, iterations=2, evaluated=24))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    index = measure.batches_of(24, 8, 2)[1]
    halves = [Quadratic(model, measure.take(trained, part), "classification") for part in (index[:4], index[4:])]
    path = measure.descent(halves[0], 2, halves[1], tolerance=0.0)
    whole = Quadratic(model, data, "classification")
    losses = whole.true_loss(whole.center + path.path).tolist()
    assert record["sizes"]["8"]["two batches"][1]["train"]["loss"] == pytest.approx(losses, rel=EXACT)


def test_tuned_losses_are_those_of_the_other_half(eval_modules):
    *_, kfac = eval_modules
    losses = torch.rand(3, len(kfac.TEMPERATURES), 10, generator=torch.Generator().manual_seed(0)).double()
    judged = kfac.Judged(10, 4, prior=1)
    expected = []
    for tune, judge in judged.halves:
        assert sorted([*tune.tolist(), *judge.tolist()]) == list(range(10))
        places = [(r, t) for r in range(3) for t in range(losses.shape[1])]
        best = min(places, key=lambda place: float(losses[place][tune].mean()))
        expected.append(float(losses[best][judge].mean()))
    assert judged.tuned(losses) == pytest.approx(sum(expected) / len(expected), rel=EXACT)
    assert judged.of(losses)["same"] == pytest.approx(float(losses[1, kfac.temperature_one()].mean()), rel=EXACT)
    assert float(kfac.TEMPERATURES[kfac.temperature_one()]) == pytest.approx(1, abs=0.01)


def test_outputs_without_a_variance_are_not_compared(eval_modules):
    *_, kfac = eval_modules
    logs, reference = torch.tensor([[1.0, -torch.inf, 3.0]]), torch.tensor([[2.0, -torch.inf, -torch.inf]])
    assert kfac.compared(logs, reference) == {"distance": 1.0, "log_ratio": -1.0}


def test_summaries_of_what_the_figures_show(eval_modules):
    import paper_document

    curvatures = torch.tensor(
        [[[8.0, 2.0], [1.0, 1.0], [3.0, 1.0]], [[2.0, 4.0], [8.0, 4.0], [4.0, 2.0]], *torch.ones(1, 3, 2)]
    )
    even, one = torch.full((4, 4), 0.2), 0.5 * torch.eye(4)
    steps = [{"uphill": [True, False], "uphill_others": [[True, True], [True, False], [False, False]]}]
    found = paper_document.shown_summary({
        "directions": {"curvatures": {"batches": curvatures.tolist(), "data": [[2.0, 2.0], [4.0, 1.0], [1.0, 1.0]]}},
        "alignment": [[torch.eye(4).tolist(), even.tolist(), one.tolist()]], "steps": steps,
    })  # fmt: skip
    assert found["ratio_own"] == pytest.approx([2.0, 8**0.5, 1.0])
    assert found["ratio_other"] == pytest.approx([0.5**0.5, (0.75 * 3) ** 0.5, 1.0])
    assert found["overlapping"] == pytest.approx([4.0, 1.0])
    assert found["largest_overlap"] == pytest.approx([0.2, 0.5])
    assert found["within_span"] == pytest.approx([0.8, 0.5])
    assert found["second_agrees"] == pytest.approx([2 / 3])


def test_images_are_moved_and_mirrored_whole(eval_modules):
    networks, *_ = eval_modules
    image = torch.arange(1.0, 26).view(1, 1, 5, 5)
    padded = nn.functional.pad(image, [2] * 4)
    possible = [
        whole[:, :, i : i + 5, j : j + 5] for whole in (padded, padded.flip(-1)) for i in range(5) for j in range(5)
    ]
    generator = torch.Generator().manual_seed(0)
    seen = {
        next(k for k, each in enumerate(possible) if torch.equal(each, moved[None]))
        for moved in networks.augmented(image.expand(400, -1, -1, -1), 2, networks.changes_of(400, 2, generator))
    }
    assert len(seen) == len(possible)
    assert networks.augmented(image, 0, networks.changes_of(1, 0, generator)) is image


def test_dropout_is_in_its_places_and_shares_the_weights(eval_modules):
    networks, *_ = eval_modules
    model = networks.SUBJECTS["all-cnn-c"].build()
    running = networks.with_dropout(model)
    kinds = [type(layer).__name__ for layer in running]
    assert [i for i, kind in enumerate(kinds) if kind == "Dropout"] == [0, 7, 14]
    assert [type(layer).__name__ for layer in running if not isinstance(layer, nn.Dropout)] == [
        type(layer).__name__ for layer in model
    ]
    assert all(a is b for a, b in zip(running.parameters(), model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_card_gives_the_numbers_of_the_cpu(eval_modules):
    networks, measure, kfac = eval_modules
    torch.manual_seed(0)
    model, data = convolutions().double().eval(), (torch.randn(48, 1, 8, 8).double(), torch.randint(3, (48,)))
    extent = measure.Extent((8,), 8, 3, 2, 3, 3, (8,), 2, 24, 1e4)
    plan = kfac.Plan((16,), 2, 12, 2, 16)

    def everything(of: nn.Module) -> list[torch.Tensor]:
        trained = networks.Trained("", of, data, data, {})
        comparison = kfac.Comparison(trained, plan).record()
        numbers = [
            measure.Directions(trained, extent).record()["sizes"]["8"], measure.figure5(trained, extent)["sizes"]["8"],
            {key: comparison[key] for key in ("prior", "network", kfac.IDENTITY)},
        ]  # fmt: skip
        numbers.append([comparison[kfac.ALL]["both"], *(run["same"] for run in comparison["fits"]["16"][kfac.DEFAULT])])
        return [torch.tensor([x for x in leaves(numbers) if not isinstance(x, str)]).double()]

    expected = everything(model)
    with VirtualCard():
        on_card = copy.deepcopy(model).to(CARD)
        actual = [value.cpu() for value in everything(on_card)]
        recipe = networks.Recipe(4, 16, 1e-3, 1e-2, shift=1)
        assert networks.trained(on_card, data, recipe, 0.0)["epochs"] == 3  # no time for more
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, equal_nan=True)
