"""`predict`: test data, tables, arrays and images in, files out, in parts that outlive an interruption."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import debiased_laplace as dl
from debiased_laplace import DebiasedLaplace
from debiased_laplace.cli import predictions
from debiased_laplace.cli.inputs import Chunk
from debiased_laplace.cli.inputs.arrays import Member
from debiased_laplace.evaluation import Context, LaplacePredictor, Task
from tests.faults.test_files import killed
from tests.test_cli import BLOBS, WAVE, invoke, told
from tests.tolerances import EXACT, FLOAT32

SQUARES = BLOBS.with_name("squares.py")
pytestmark = pytest.mark.filterwarnings("ignore:The best prior precision:UserWarning")  # little data, large priors


def fitted(folder: Path, task: Path) -> Path:
    """A posterior of a task with a prior precision at which it has something to say."""
    loaded, path = Task.load(task), folder / f"{task.stem}.safetensors"
    noise = {"sigma_noise": 0.3} if loaded.likelihood == "regression" else {}
    la = DebiasedLaplace(loaded.model(Context()), loaded.likelihood, prior_precision=3.0, **noise)
    la.fit(loaded.call("train_loader", Context()), budget=None)
    la.save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("posteriors")


@pytest.fixture(scope="module")
def blobs(folder: Path) -> Path:
    return fitted(folder, BLOBS)


@pytest.fixture(scope="module")
def wave(folder: Path) -> Path:
    return fitted(folder, WAVE)


@pytest.fixture(scope="module")
def squares(folder: Path) -> Path:
    return fitted(folder, SQUARES)


def predicted(task: Path, posterior: Path, out: Path, *options: object) -> dict[str, Any]:
    """The arrays, or the columns, that the command writes."""
    result = invoke("predict", task, posterior, "--out", out, "--device", "cpu", *options)
    assert result.exit_code == 0, result.output
    if out.suffix == ".csv":
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: [row[name] for row in rows] for name in rows[0]}
    with np.load(out) as stored:
        return dict(stored)


def save_table(path: Path, rows: Tensor, names: str = "", separator: str = ",") -> Path:
    lines = [separator.join(map(repr, row)) for row in rows.double().tolist()]
    path.write_text("\n".join([names, *lines][0 if names else 1 :]) + "\n")
    return path


# -- what is predicted -----------------------------------------------------------------------------


def test_classes_with_their_uncertainties(blobs: Path, tmp_path: Path) -> None:
    """Probabilities are those of the posterior; entropy and information by their definitions."""
    inputs, targets = Task.load(BLOBS).definition.data(300, 70)
    la = DebiasedLaplace.load(blobs, Task.load(BLOBS).model(Context()))
    expected, p = la.native.predict(inputs), la(inputs).double().numpy()
    got = predicted(BLOBS, blobs, tmp_path / "p.npz")
    assert got["probabilities"] == pytest.approx(p, abs=FLOAT32)
    assert got["predicted"].tolist() == p.argmax(1).tolist()
    assert got["targets"].tolist() == targets.tolist()
    assert got["entropy"] == pytest.approx(-(p * np.log(p)).sum(1), abs=FLOAT32)
    assert got["functional_variance"] == pytest.approx(expected.outputs_variance.sum(1).numpy(), rel=FLOAT32)
    information = LaplacePredictor(la)(inputs).mutual_information
    assert information is not None
    assert got["mutual_information"] == pytest.approx(information.numpy(), abs=FLOAT32)


def test_regressions_with_their_uncertainties(wave: Path, tmp_path: Path) -> None:
    inputs, _ = Task.load(WAVE).definition.data(300, 70)
    expected = DebiasedLaplace.load(wave, Task.load(WAVE).model(Context())).native.predict(inputs)
    got = predicted(WAVE, wave, tmp_path / "p.npz")
    assert expected.epistemic_variance is not None
    assert got["mean"] == pytest.approx(expected.mean.numpy(), abs=FLOAT32)
    assert got["epistemic_std"] == pytest.approx(expected.epistemic_variance.sqrt().numpy(), rel=FLOAT32)
    assert got["total_std"] ** 2 == pytest.approx(got["epistemic_std"] ** 2 + 0.3**2, rel=FLOAT32)
    assert got["variance"] == pytest.approx(got["total_std"] ** 2, rel=FLOAT32)


def test_one_logit_gives_two_classes(tmp_path: Path) -> None:
    text = SQUARES.read_text().replace("nn.Linear(16, 2)", "nn.Linear(16, 1)").replace(
        "nn.functional.cross_entropy(network(images), targets)",
        "nn.functional.binary_cross_entropy_with_logits(network(images)[:, 0], targets.float())",
    )  # fmt: skip
    task = tmp_path / "logit.py"
    task.write_text(text + '\n\nLIKELIHOOD = "bernoulli"\n')
    posterior = fitted(tmp_path, task)
    native = DebiasedLaplace.load(posterior, Task.load(task).model(Context())).native
    p = native.predict(Task.load(task).definition.data(3, 20)[0]).probabilities.double().numpy()
    got = predicted(task, posterior, tmp_path / "p.npz")
    assert got["probabilities"] == pytest.approx(np.concatenate([1 - p, p], 1), abs=FLOAT32)
    assert got["predicted"].tolist() == (p[:, 0] > 0.5).tolist()


def test_labels_each_by_itself() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    posterior = dl.fit(nn.Linear(3, 2), [(x, (x[:, :2] > 0).float())], dl.Bernoulli())
    got = predictions.predicted(posterior, x)
    p = posterior.predict(x).probabilities.numpy()
    assert got["probabilities"] == pytest.approx(p, abs=FLOAT32)
    assert got["predicted"].tolist() == (p > 0.5).astype(int).tolist()
    assert "entropy" not in got


def test_dense_outputs() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(6, 1, 3, 3), torch.randint(4, (6, 3, 3))
    posterior = dl.fit(nn.Conv2d(1, 4, 1), [(x, y)], "classification")
    got = predictions.predicted(posterior, x)
    p = posterior.predict(x).probabilities.double().numpy()
    assert got["predicted"].tolist() == p.argmax(1).tolist()
    assert got["entropy"] == pytest.approx(-(p * np.log(p)).sum(1), abs=FLOAT32)


def test_a_posterior_of_the_native_object(tmp_path: Path) -> None:
    loaded = Task.load(BLOBS)
    dl.fit(loaded.model(Context()), loaded.call("train_loader", Context()), "classification").save(tmp_path / "native")
    assert len(predicted(BLOBS, tmp_path / "native", tmp_path / "p.npz")["probabilities"]) == 70


def test_predictions_that_are_not_finite_are_refused(blobs: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[0.0, 1.0], [np.inf, 0.0]]))
    result = invoke("predict", BLOBS, blobs, "--inputs", tmp_path / "x.npy", "--out", tmp_path / "p.npz")
    assert "Expected finite predictions" in told(result)
    assert "first for datum 1 of this batch" in told(result)


# -- tables ----------------------------------------------------------------------------------------


def test_a_table_in_and_a_table_out(blobs: Path, tmp_path: Path) -> None:
    """In chunks of any size, with names or without, and with other columns beside the inputs."""
    inputs, _ = Task.load(BLOBS).definition.data(300, 70)
    expected = predicted(BLOBS, blobs, tmp_path / "all.npz")["probabilities"]
    plain = save_table(tmp_path / "plain.csv", inputs)
    got = predicted(BLOBS, blobs, tmp_path / "p.csv", "--inputs", plain, "--batch-size", 16)
    assert list(got)[:6] == ["row", "predicted", "label", "probability_east", "probability_north", "probability_south"]
    assert got["row"] == [str(i) for i in range(70)]
    columns = np.array([got[f"probability_{name}"] for name in ("east", "north", "south")], dtype=float).T
    assert columns == pytest.approx(expected, abs=FLOAT32)
    assert got["label"] == [("east", "north", "south")[int(index)] for index in got["predicted"]]
    wide = torch.cat([torch.arange(70.0)[:, None], inputs.flip(1)], 1)
    named = save_table(tmp_path / "named.csv", wide, "id;y;x", ";")
    got = predicted(BLOBS, blobs, tmp_path / "q.npz", "--inputs", named, "--columns", "x, y")
    assert got["probabilities"] == pytest.approx(expected, abs=FLOAT32)


def test_numbers_that_pandas_gives_columns_are_their_names(blobs: Path, tmp_path: Path) -> None:
    inputs, _ = Task.load(BLOBS).definition.data(300, 70)
    named, plain = (save_table(tmp_path / f"x{name}.csv", inputs, name) for name in ("0,1", ""))
    got, expected = (predicted(BLOBS, blobs, tmp_path / "p.npz", "--inputs", path) for path in (named, plain))
    assert got["probabilities"].tolist() == expected["probabilities"].tolist()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("1,2\n3,4,5\n", (), "Expected 2 columns in row 2 of x.csv, as in the first one, got 3."),
        ("a,b\n1,\n", (), "Expected a finite number in column 'b' of row 1 of x.csv, got ''."),
        ("1,2\n1,nan\n", (), "Expected a finite number in column 2 of row 2 of x.csv, got 'nan'."),
        ("1,2\n,\n3,4\n", (), "Expected a finite number in column 1 of row 2 of x.csv, got ''."),
        ("a,b,c\n1,2,3\n", (), "Expected 2 columns of inputs in x.csv"),
        ("a,b,c\n1,2,3\n", (), "got 3: a, b, c. Name those that are inputs with --columns"),
        ("a,b,c\n1,2,3\n", ("--columns", "a,d"), "Expected columns out of a, b, c of x.csv, got d."),
        ("1,2\n", ("--columns", "a,b"), "Expected a first line of names in x.csv for --columns, got numbers."),
        ("", (), "Expected rows of numbers in x.csv, got none."),
        ("a,b\n", (), "Expected rows of numbers in x.csv, got none."),
        (b"\xff\xfe1", (), "Expected a CSV file in UTF-8, got x.csv"),
    ],
)
def test_what_is_wrong_in_a_table(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes, options: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in told(invoke("predict", BLOBS, blobs, "--inputs", "x.csv", *options))
    assert not Path("predictions.npz").exists()


# -- arrays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("save", "order"), [(np.save, "C"), (np.save, "F"), (np.savez, "F"), (np.savez_compressed, "C")]
)
def test_arrays(blobs: Path, tmp_path: Path, save: Callable[..., None], order: str) -> None:
    inputs, _ = Task.load(BLOBS).definition.data(300, 70)
    array = np.asarray(inputs.numpy(), order=order)  # type: ignore[call-overload]
    path = tmp_path / f"x.np{'y' if save is np.save else 'z'}"
    save(path, array)
    got = predicted(BLOBS, blobs, tmp_path / "p.npz", "--inputs", path, "--batch-size", 32)["probabilities"]
    assert got == pytest.approx(predicted(BLOBS, blobs, tmp_path / "q.npz")["probabilities"], abs=FLOAT32)


def test_rows_of_an_array_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    array = np.arange(60.0).reshape(20, 3)
    np.savez_compressed(tmp_path / "x.npz", a=array)
    member = Member(tmp_path / "x.npz", "a")
    assert member.rows(2, 5).tolist() == array[2:5].tolist()
    assert member.rows(11, 20).tolist() == array[11:].tolist()
    with pytest.raises(ValueError, match="Expected rows after 20, got 3"):
        member.rows(3, 4)


def test_arrays_by_name_are_the_inputs_of_a_dictionary(tmp_path: Path) -> None:
    task = tmp_path / "words.py"
    task.write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Bag(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.embed = nn.Embedding(5, 3)\n"
        "        self.out = nn.Linear(3, 2)\n\n"
        "    def forward(self, ids, mask):\n        return self.out((self.embed(ids) * mask[..., None]).sum(1))\n\n\n"
        "def model():\n    torch.manual_seed(0)\n    return Bag()\n\n\n"
        "def train_loader(seed=0):\n    g = torch.Generator().manual_seed(0)\n"
        "    ids = torch.randint(5, (30, 4), generator=g)\n"
        "    return [{'ids': ids, 'mask': torch.ones(30, 4), 'labels': ids[:, 0] % 2}]\n\n\n"
        "val_loader = test_loader = train_loader\n"
    )
    posterior = fitted(tmp_path, task)
    ids = Task.load(task).definition.train_loader()[0]["ids"]
    np.savez(tmp_path / "x.npz", ids=ids.numpy(), mask=np.ones((30, 4)), other=np.ones(2))
    got = predicted(task, posterior, tmp_path / "p.npz", "--inputs", tmp_path / "x.npz", "--batch-size", 7)
    expected = predicted(task, posterior, tmp_path / "q.npz")
    assert got["probabilities"] == pytest.approx(expected["probabilities"], abs=FLOAT32)
    np.savez(tmp_path / "y.npz", ids=ids.numpy(), masks=np.ones((30, 4)))
    said = told(invoke("predict", task, posterior, "--inputs", tmp_path / "y.npz"))
    assert "got ids, masks: 'mask' is missing." in said
    result = invoke("predict", task, posterior, "--inputs", save_table(tmp_path / "x.csv", torch.ones(2, 4)))
    assert "Expected a task whose inputs are one tensor for a table or images" in told(result)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((3, 5))}, "Expected data of shape [2] in x.npz"),
        ({"x": np.ones((3, 2), np.uint8)}, "got bytes: they would not be scaled as the training data were"),
        ({"x": np.ones((3, 2), np.uint16)}, "got torch.uint16: they would not be scaled as the training data were"),
        ({"x": np.array([{}, {}])}, "'x' has Python objects in it, no numbers"),
        ({"x": np.ones(())}, "'x' of x.npz is a single number"),
        ({"x": np.ones((3, 2)), "y": np.ones((3, 2))}, "or one that is called 'inputs', got x, y."),
    ],
)
def test_what_is_wrong_in_arrays(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", **arrays)
    assert message in told(invoke("predict", BLOBS, blobs, "--inputs", "x.npz"))


def test_files_of_another_kind(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("x.parquet", "or a file .csv, .npy or .npz, got x.parquet"),
        ("y.npz", "Expected NumPy arrays in y.npz"),
        ("z.npy", "Expected NumPy arrays in z.npy"),
    ):
        Path(name).write_text("no")
        assert message in told(invoke("predict", BLOBS, blobs, "--inputs", name))
    result = invoke("predict", BLOBS, blobs, "--inputs", "missing.csv")
    assert "missing.csv does not exist" in told(result)
    assert result.exit_code == 2
    result = invoke("predict", BLOBS, blobs, "--inputs", "y.npz", "--columns", "a")
    assert "Expected a .csv file as --inputs" in told(result)
    assert result.exit_code == 2
    result = invoke("predict", BLOBS, blobs, "--out", "p.txt")
    assert "Expected a file .npz or .csv, got p.txt" in told(result)
    assert result.exit_code == 2


# -- images ----------------------------------------------------------------------------------------


def save_images(folder: Path, images: Tensor) -> Tensor:
    """As files in two folders; the numbers that a file can hold of them."""
    for index, image in enumerate(images):
        path = folder / f"class{index % 2}" / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray((255 * image[0]).round().to(torch.uint8).numpy()).save(path)
    (folder / "notes.txt").write_text("no image")
    return (255 * images).round() / 255


def test_a_folder_of_images(squares: Path, tmp_path: Path) -> None:
    images = save_images(tmp_path / "images", Task.load(SQUARES).definition.data(3, 20)[0])
    got = predicted(SQUARES, squares, tmp_path / "p.npz", "--inputs", tmp_path / "images", "--batch-size", 6)
    order = [*range(0, 20, 2), *range(1, 20, 2)]
    assert got["names"].tolist() == [f"class{index % 2}/{index:02}.png" for index in order]
    model = Task.load(SQUARES).model(Context())
    expected = DebiasedLaplace.load(squares, model)(images[order])
    assert got["probabilities"] == pytest.approx(expected.numpy(), abs=FLOAT32)
    table = predicted(SQUARES, squares, tmp_path / "p.csv", "--inputs", tmp_path / "images")
    assert table["names"] == got["names"].tolist()


TRANSFORM = """

def transform(image):
    import numpy as np

    return torch.from_numpy(np.array(image.convert("L").resize((4, 4), 0)) / 255)[None]
"""


def test_a_transform_of_the_task_sees_every_image(tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(SQUARES.read_text() + TRANSFORM)
    posterior, images = fitted(tmp_path, task), Task.load(task).definition.data(3, 4)[0]
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    save_images(tmp_path / "large", large)
    save_images(tmp_path / "small", images)
    got = predicted(task, posterior, tmp_path / "p.npz", "--inputs", tmp_path / "large")
    expected = predicted(SQUARES, posterior, tmp_path / "q.npz", "--inputs", tmp_path / "small")
    assert got["probabilities"] == pytest.approx(expected["probabilities"], abs=EXACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((), "Expected images of 4 x 4 pixels, as test_loader() of task.py has them, got 8 x 8"),
        (("    return [data(3, 20)]", "    return [(4 * data(3, 20)[0] - 2, data(3, 20)[1])]"), "they were normalised"),
        (("def test_loader", "def transform(image):\n    return image.nothing\n\n\ndef test_loader"),
         "transform() of task.py failed for images/class0/00.png: AttributeError"),
        (("def test_loader", "def transform(image):\n    return torch.ones(3)\n\n\ndef test_loader"),
         "Expected transform() of task.py to return a tensor [1, 4, 4], as test_loader() has them, got [3]"),
        (("def test_loader", "def transform(image):\n    return torch.ones(1, 4, 4).byte()\n\n\ndef test_loader"),
         "in what transform() of task.py returns for images/class0/00.png, as test_loader() of task.py has it, got"),
        (("def test_loader", "def transform(image):\n    raise SystemExit('no statistics')\n\n\ndef test_loader"),
         "transform() of task.py failed for images/class0/00.png: SystemExit: no statistics"),
        (("def test_loader", "def transform(image):\n    return image\n\n\ndef test_loader"),
         "Expected transform() of task.py to return a tensor, got"),
    ],
)  # fmt: skip
def test_images_that_do_not_fit(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = SQUARES.read_text()
    Path("task.py").write_text(text.replace(*change) if change else text)
    save_images(Path("images"), torch.rand(2, 1, 8, 8))
    said = told(invoke("predict", "task.py", squares, "--inputs", "images"))
    assert message in said
    assert "transform(" in said


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_images_of_more_than_eight_bits_need_a_transform(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Converting would clip them all to white, or to black."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    pixels = torch.rand(4, 4) if mode == "F" else (65535 * torch.rand(4, 4)).to(torch.uint16)
    Image.fromarray(pixels.numpy()).save("images/a.tif" if mode == "F" else "images/a.png")
    said = told(invoke("predict", SQUARES, squares, "--inputs", "images"))
    assert "Expected an image with 8 bits for each channel in" in said
    assert f"got one of mode {mode!r}" in said


def test_files_that_are_no_images(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_images(Path("images"), torch.rand(2, 1, 4, 4))
    Path("images/class0/00.png").write_text("no image")
    Path("empty").mkdir()
    for name, message in (
        ("images", "Expected an image in images/class0/00.png"),
        ("empty", "Expected images (.bmp"),
    ):
        assert message in told(invoke("predict", SQUARES, squares, "--inputs", name))


def test_images_of_a_task_without_images(blobs: Path, tmp_path: Path) -> None:
    save_images(tmp_path / "images", torch.rand(2, 1, 4, 4))
    said = told(invoke("predict", BLOBS, blobs, "--inputs", tmp_path / "images"))
    assert "Expected a task with images [N, channels, H, W]" in said


# -- interruptions ---------------------------------------------------------------------------------


def interrupted_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Interrupt the n-th chunk that is predicted; sizes of those before are in the list."""
    sizes, original = [], predictions.predicted

    def interrupt(posterior: Any, inputs: Any) -> Any:
        if len(sizes) + 1 == number:
            raise KeyboardInterrupt
        sizes.append(len(inputs))
        return original(posterior, inputs)

    monkeypatch.setattr(predictions, "predicted", interrupt)
    return sizes


@pytest.mark.parametrize(("kind", "suffix"), [("loader", "npz"), ("table", "csv")])
def test_interrupted_predictions_go_on(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, kind: str
) -> None:
    table = save_table(tmp_path / "x.csv", Task.load(BLOBS).definition.data(300, 70)[0])
    options = ("--inputs", table, "--batch-size", 32) if kind == "table" else ()
    predicted(BLOBS, blobs, tmp_path / f"whole.{suffix}", *options)
    out = tmp_path / f"p.{suffix}"
    with monkeypatch.context() as patch:
        interrupted_at(3, patch)
        result = invoke("predict", BLOBS, blobs, "--out", out, *options)
    assert result.exit_code == 130
    assert "Interrupted. 64 data are kept in" in told(result)
    assert not out.exists()
    (parts,) = tmp_path.glob("*.parts")
    first, _ = sorted(parts.iterdir())
    first.write_bytes(first.read_bytes()[:100])  # a damaged part is made anew
    with monkeypatch.context() as patch:
        sizes = interrupted_at(0, patch)
        result = invoke("predict", BLOBS, blobs, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert sizes == [32, 6]
    assert "32 of 70 had been predicted before." in result.stderr
    assert out.read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def test_parts_of_another_posterior_are_not_used(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, other = tmp_path / "p.npz", tmp_path / "other.safetensors"
    la = DebiasedLaplace.load(blobs, Task.load(BLOBS).model(Context()))
    la.prior_precision = 50.0
    la.save(other)
    with monkeypatch.context() as patch:
        interrupted_at(2, patch)
        invoke("predict", BLOBS, blobs, "--out", out)
    sizes = interrupted_at(0, monkeypatch)
    result = invoke("predict", BLOBS, other, "--out", out)
    assert sizes == [32, 32, 6]
    assert "interrupted predictions of another posterior or other data" in " ".join(result.stderr.split())


def test_parts_of_another_transform_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the task file is the same, and a file that it reads is not."""
    task, images = tmp_path / "task.py", tmp_path / "images"
    scale = f"float(open({str(tmp_path / 'scale.txt')!r}).read())"
    task.write_text(SQUARES.read_text() + TRANSFORM.replace(" / 255", f" * {scale} / 255"))
    (tmp_path / "scale.txt").write_text("1.0")
    posterior = fitted(tmp_path, task)
    save_images(images, Task.load(SQUARES).definition.data(3, 8)[0])
    options = ("--inputs", images, "--batch-size", 4)
    with monkeypatch.context() as patch:
        interrupted_at(2, patch)
        assert invoke("predict", task, posterior, "--out", tmp_path / "p.npz", *options).exit_code == 130
    (tmp_path / "scale.txt").write_text("0.5")
    sizes = interrupted_at(0, monkeypatch)
    predicted(task, posterior, tmp_path / "p.npz", *options)
    assert sizes == [4, 4]


def test_what_is_read_is_not_written_over(blobs: Path, tmp_path: Path) -> None:
    table = save_table(tmp_path / "x.csv", Task.load(BLOBS).definition.data(300, 7)[0])
    before = table.read_bytes()
    result = invoke("predict", BLOBS, blobs, "--inputs", table, "--out", tmp_path / "." / "x.csv")
    assert result.exit_code == 2
    assert "is read by this command. Name another file." in told(result)
    assert table.read_bytes() == before
    assert invoke("fit", BLOBS, "--out", BLOBS).exit_code == 2


def test_a_table_of_dense_outputs_is_refused_before_all_is_predicted(tmp_path: Path) -> None:
    class Dense:
        total = 8

        def chunks(self) -> Any:
            yield Chunk(0, 2, lambda: torch.zeros(2, 1, 3, 3))
            raise AssertionError("everything is predicted")

    model = nn.Conv2d(1, 2, 1)
    posterior = dl.fit(model, [(torch.randn(6, 1, 3, 3), torch.randint(2, (6, 3, 3)))], "classification")
    parts = predictions.Parts(tmp_path / "d.csv", {})
    with pytest.raises(ValueError, match=r"Expected a row of numbers for each datum for a \.csv file, got predicted"):
        parts.make(posterior, Dense())  # type: ignore[arg-type]


def test_a_part_of_other_data_is_made_anew(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what the digest of a loader sees: every chunk of it has a digest of its own."""
    native = DebiasedLaplace.load(blobs, Task.load(BLOBS).model(Context())).native

    class Source:
        total = 8

        def __init__(self, last: str) -> None:
            self.digests = ("a", last)

        def digest(self) -> str:
            return "the same"

        def chunks(self) -> Any:
            for start, digest in zip((0, 4), self.digests, strict=True):
                yield Chunk(start, 4, lambda: torch.zeros(4, 2), {}, digest)

    predictions.Parts(tmp_path / "p.npz", {}).make(native, Source("b"))
    sizes, parts = interrupted_at(0, monkeypatch), predictions.Parts(tmp_path / "p.npz", {})
    parts.make(native, Source("c"))
    assert (sizes, parts.n_kept, parts.n) == ([4], 4, 8)


@pytest.mark.faults
def test_predictions_that_are_killed_at_any_write_become_the_same_file(blobs: Path, tmp_path: Path) -> None:
    predicted(BLOBS, blobs, tmp_path / "whole.npz")
    out, number = tmp_path / "p.npz", 0
    while True:
        number += 1
        if not killed(lambda: invoke("predict", BLOBS, blobs, "--out", out), "replace", number):
            break
        assert not out.exists()
        kept = sorted(path for parts in tmp_path.glob("*.parts") for path in parts.glob("*.npz"))
        assert len(kept) == number - 1 if number < 4 else 3
        predicted(BLOBS, blobs, out)
        assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
        out.unlink()
    assert number == 5  # three parts, and the file


def test_data_of_other_lengths(tmp_path: Path) -> None:
    """Predictions of one shape, or an error that says so; a table has no room for dense ones."""
    task = tmp_path / "dense.py"
    task.write_text(
        "import torch\nfrom torch import nn\n\nSIZES = [3, 3]\n\n\ndef model():\n    torch.manual_seed(0)\n"
        "    return nn.Conv2d(1, 2, 1)\n\n\ndef train_loader():\n    torch.manual_seed(1)\n"
        "    return [(torch.rand(6, 1, s, s), torch.randint(2, (6, s, s))) for s in SIZES]\n\n\n"
        "val_loader = test_loader = train_loader\n"
    )
    loaded, posterior = Task.load(task), tmp_path / "dense.safetensors"
    dl.fit(loaded.model(Context()), loaded.call("train_loader", Context()), "classification").save(posterior)
    assert predicted(task, posterior, tmp_path / "p.npz")["probabilities"].shape == (12, 2, 3, 3)
    result = invoke("predict", task, posterior, "--out", tmp_path / "p.csv")
    assert "Expected a row of numbers for each datum for a .csv file" in told(result)
    task.write_text(task.read_text().replace("[3, 3]", "[3, 4]"))
    result = invoke("predict", task, posterior, "--out", tmp_path / "q.npz")
    assert "of one shape for all data, got [3, 3] and [4, 4]" in told(result)


def test_the_largest_batch_is_what_was_asked_for(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = interrupted_at(0, monkeypatch)
    predicted(BLOBS, blobs, tmp_path / "p.npz", "--batch-size", 20)
    assert max(sizes) == 20
    assert sum(sizes) == 70
    assert len(sizes) == 5  # of batches of 32, 32 and 6
