"""``evaluate --attack``: what it reports, against attacks that need no gradient and attacks of another model."""

import json
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipdistill.attacks import apgd
from clipdistill.cli import main
from clipdistill.errors import InputError
from clipdistill.evaluation import load_for_evaluation, open_set
from clipdistill.evaluation.attack import AttackSettings, PixelClassifier, attack_batch, shown_radius
from clipdistill.evaluation.encoding import encode_classes, evaluation_transform
from clipdistill.io.resources import resource
from tests.conftest import colour_samples
from tests.evaluation.test_sets import shard_set

ROOT = Path(__file__).parents[2]
ICONS = f"local-dir:{resource('weights', 'icons-teacher')}"


@pytest.fixture(scope="module")
def trained(colours: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student knows the colours."""
    folder = tmp_path_factory.mktemp("trained")
    config = {
        "output": str(folder / "run"),
        "student": {"model": str(tiny_model)},
        "data": {"shards": [str(colours / "train")], "batch_size": 16, "workers": 0, "cache": str(folder / "cache")},
        "prompts": str(colours / "prompts"),
        "labels": "dataset",
        "objective": [{"loss": "clip", "over": "prompts"}],
        "optimizer": {"lr": 0.01},
        "train": {"steps": 60, "trackers": []},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    assert main(["train", "--config", str(path)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def seen(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 coloured pictures that no model was trained on, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("seen") / "colours"
    samples = colour_samples(30, first=8000)
    samples[7]["png"] = b"no picture"
    return shard_set(folder, samples)


def metrics_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["metrics"]
    return found


@pytest.mark.parametrize("attack", ["apgd", "pgd"])
def test_an_undefended_student_falls(
    trained: Path, seen: Path, attack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clean accuracy is that of the plain evaluation; under attack it falls with the radius, and to nearly 0."""
    common = ("--model", str(trained), "--data", str(seen))
    clean = metrics_of(capsys, *common)
    eps = ("1/255", "8/255", "0.7")
    found = metrics_of(capsys, *common, "--attack", attack, "--eps", *eps)
    assert found["acc1"] == clean["acc1"]
    assert found["unreadable"] == 1
    values = [found["acc1"], *(found[f"robust_acc1@{radius}"] for radius in eps)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.8
    assert values[-1] == found["robust_acc1"] < 0.1


@pytest.fixture
def problem(trained: Path, seen: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """The trained student as a function of pixels, pictures, and their classes."""
    tower, data = load_for_evaluation(str(trained)), open_set(str(seen))
    model = PixelClassifier(tower, encode_classes(tower, data.prompts))
    samples = [sample for sample in data.samples() if sample.data != b"no picture"]
    normalised = torch.stack([evaluation_transform(tower)(sample.decode()[0]) for sample in samples])
    pixels = (normalised * tower.pixels.std + tower.pixels.mean).clamp(0, 1)
    with torch.no_grad():
        expected = tower.logit_scale * tower.encode_image((255 * pixels).round().byte()) @ model._bank_CD.T
        torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=1e-4)
    return model, pixels, torch.tensor([sample.label for sample in samples])


def settings(**changes: Any) -> AttackSettings:
    values = {"attack": "apgd", "norm": "linf", "radii": (Fraction(8, 255),), "images": 100, "seed": 0}
    return AttackSettings(**(values | changes))


def test_no_attack_without_gradients_is_stronger(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Gradient masking would show: random search in the ball finds nothing that the white-box attack does not find."""
    model, pixels, labels = problem
    torch.manual_seed(0)
    for radius in (Fraction(8, 255), Fraction(24, 255)):
        _, robust_B = attack_batch(model, pixels, labels, settings(radii=(radius,)))
        found_B = torch.zeros_like(robust_B)
        with torch.no_grad():
            for _ in range(300):
                corner = (pixels + float(radius) * (2 * torch.randint(0, 2, pixels.shape) - 1)).clamp(0, 1)
                squares = torch.nn.functional.interpolate(torch.randn(len(pixels), 3, 2, 2), pixels.shape[-2:])
                for attacked in (corner, (pixels + float(radius) * squares.sign()).clamp(0, 1)):
                    found_B |= model(attacked).argmax(1) != labels
        assert not (found_B & robust_B).any()


def test_no_attack_of_another_model_is_stronger(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, pixels, labels = problem
    torch.manual_seed(1)
    other = nn.Sequential(nn.Flatten(), nn.Linear(pixels[0].numel(), 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(other.parameters(), 1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(pixels), labels).backward()
        optimizer.step()
    radius = 16 / 255
    _, robust_B = attack_batch(model, pixels, labels, settings(radii=(Fraction(16, 255),)))
    transferred = apgd(other, pixels, labels, epsilon=radius)
    with torch.no_grad():
        fooled_B = model(transferred).argmax(1) != labels
    assert not (fooled_B & robust_B).any()


def test_apgd_is_at_least_as_strong_as_pgd(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    radii = (Fraction(2, 255), Fraction(6, 255), Fraction(12, 255))
    rows = {}
    for attack in ("pgd", "apgd"):
        torch.manual_seed(0)
        rows[attack] = attack_batch(*problem, settings(attack=attack, radii=radii)).sum(1)
    assert (rows["apgd"] <= rows["pgd"]).all()
    assert rows["pgd"][0] == rows["apgd"][0]


def test_a_model_without_gradient_is_refused(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, pixels, labels = problem

    class Rounded(nn.Module):
        def forward(self, pixels_BCHW: Tensor) -> Tensor:
            return model((255 * pixels_BCHW).round() / 255)

    with pytest.raises(InputError, match="gives no gradient to its pixels"):
        attack_batch(Rounded(), pixels, labels, settings())


def test_a_certain_model_is_attacked() -> None:
    """Its cross-entropy is 0 to rounding, and so is the gradient: that alone is no reason to refuse."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([1000.0, 0, 0, 0, 0]))
    rows = attack_batch(model, torch.rand(3, 3, 2, 2), torch.zeros(3, dtype=torch.long), settings())
    assert rows.all()


def test_results_are_kept_by_the_settings_of_the_attack(
    trained: Path, seen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same call measures nothing; another radius or seed does. Details hold each class."""
    folder = tmp_path / "results"

    def call(*more: str) -> list[dict[str, Any]]:
        arguments = ["--model", str(trained), "--data", str(seen), "--output", str(folder), "--attack", "pgd", *more]
        assert main(["evaluate", *arguments]) == 0
        lines = [json.loads(file.read_text()) for file in folder.rglob("*.json")]
        return [each for each in lines if isinstance(each, dict) and "robust_acc1" in each.get("metrics", {})]

    (first,) = call("--eps", "8/255", "--attack-images", "20")
    assert first["task"] == "attack"
    assert set(first["metrics"]) == {"acc1", "robust_acc1@8/255", "robust_acc1", "unreadable"}
    (again,) = call("--eps", "8/255", "--attack-images", "20")
    assert again == first
    (other,) = call("--eps", "16/255", "--attack-images", "20")
    assert "robust_acc1@16/255" in other["metrics"]


def test_with_a_teacher_both_are_attacked(trained: Path, seen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = metrics_of(
        capsys,
        *("--model", str(trained), "--teacher", str(trained), "--data", str(seen), "--attack", "pgd", "--eps", "8/255"),
    )
    assert found["teacher_robust_acc1"] == found["robust_acc1"]
    assert found["share_of_teacher"] in (1.0, None)


@pytest.mark.slow
def test_ranks_find_the_same(trained: Path, seen: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        output = tmp_path / f"{ranks}.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "scripts/evaluate.py"]
        arguments = ["--model", trained, "--data", seen, "--attack", "--eps", "4/255", "12/255", "--batch-size", "4"]
        command = [sys.executable, *launcher, *map(str, arguments), "--output", str(output)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(output.read_text())["metrics"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attack", "--eps", "0"], "argument --eps: 0 is not allowed; allowed: a number in (0, 1], or a quotient"),
        (["--attack", "--eps", "300/255"], "argument --eps: 300/255 is not allowed"),
        (["--attack", "--eps", "x"], "argument --eps: x is not allowed"),
        (["--attack", "fgsm"], "argument --attack: invalid choice: 'fgsm'"),
        (["--attack", "--norm", "l1"], "argument --norm: invalid choice: 'l1'"),
        (["--attack", "--attack-images", "0"], "argument --attack-images: 0 is not allowed"),
        (["--eps", "1/255"], "--eps: given without --attack; allowed: only with --attack"),
        (["--attack", "--task", "linear_probe"], "--attack: given with --task linear_probe; allowed: without --task"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, seen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", ICONS, "--data", str(seen), *arguments]
    try:
        code: Any = main(command)
    except SystemExit as end:
        code = end.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_retrieval_sets_are_refused(
    trained: Path, seen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], write_retrieval: Callable[[], Path]
) -> None:
    command = ["evaluate", "--model", str(trained), "--data", str(write_retrieval()), "--attack"]
    assert main(command) == 2
    assert "allowed: a classification set" in capsys.readouterr().err


@pytest.fixture
def write_retrieval(tmp_path: Path) -> Callable[[], Path]:
    def write() -> Path:
        samples = [{key: sample[key] for key in ("key", "png", "txt")} for sample in colour_samples(4)]
        return shard_set(tmp_path / "texts", samples, kind="retrieval")

    return write


@pytest.mark.parametrize(
    ("radius", "shown"), [(Fraction(4, 255), "4/255"), (Fraction(1, 2), "0.5"), (Fraction("0.03"), "0.03"), (1, "1")]
)
def test_radii_are_shown_as_the_field_writes_them(radius: Fraction, shown: str) -> None:
    assert shown_radius(Fraction(radius)) == ("255/255" if radius == 1 else shown)
