"""Towers whose input is not square, beside square ones: through every command, and the same pixels in each."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipdistill.cli import main
from clipdistill.data import StreamLoader, expand_urls, index_shards
from clipdistill.evaluation.encoding import encode_set
from clipdistill.evaluation.sets.open import open_set
from clipdistill.models.loading import load_student, read_image_size
from tests.conftest import TINY_MODEL, colour_samples, write_tar
from tests.shards.test_shards import encode
from tests.streams import make_stream


@pytest.fixture
def oblong_model(tmp_path: Path) -> Callable[..., str]:
    """Config of a tiny model of a given input size."""

    def write(height: int, width: int) -> str:
        vision = TINY_MODEL["vision_cfg"] | {"image_size": [height, width]}
        path = tmp_path / f"oblong-{height}-{width}.json"
        path.write_text(json.dumps(TINY_MODEL | {"vision_cfg": vision}))
        return str(path)

    return write


@pytest.mark.parametrize("size", [(32, 16), (16, 24)])
@pytest.mark.parametrize("shared", [(16, 16), (48, 48)])
def test_a_tower_sees_in_training_what_it_sees_in_evaluation(
    tmp_path: Path, oblong_model: Callable[..., str], size: tuple[int, int], shared: tuple[int, int]
) -> None:
    """Beside a square tower; on square pictures, whose central part is the same for both."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 48), torch.linspace(0, 1, 48), indexing="ij")
    samples = colour_samples(8)
    for number, sample in enumerate(samples):
        smooth = torch.stack([x, y, (x * (number + 1) * y).sin() ** 2], dim=-1)
        sample["png"] = encode(Image.fromarray((255 * smooth).byte().numpy()))
    write_tar(tmp_path / "set" / "test" / "0.tar", samples)
    (tmp_path / "set" / "test" / "nshards.txt").write_text("1")
    (tmp_path / "set" / "classnames.txt").write_text("red\ngreen\nblue\ngrey\n")
    (tmp_path / "set" / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    torch.manual_seed(0)
    tower = load_student(oblong_model(*size)).eval()
    assert tower.image_size == read_image_size(oblong_model(*size)) == size
    index = index_shards(expand_urls([str(tmp_path / "set" / "test")]), cache_dir=None)
    pixels = tuple(max(lengths) for lengths in zip(size, shared, strict=True))
    stream = make_stream(index, batch_size=8, image_size=pixels, augmentation=None, shuffle=0)
    batch = next(iter(StreamLoader(stream)))
    assert batch.image_BCHW.shape == (8, 3, *pixels)
    expected = encode_set(tower, open_set(tmp_path / "set"))
    order = [batch.keys.index(key) for key in expected.keys]
    with torch.no_grad():
        found_BD = tower.encode_image(batch.image_BCHW)[order]
    torch.testing.assert_close(found_BD, expected.image_ND, atol=0.02, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [False, True])
def test_a_student_that_is_not_square_through_every_command(
    write_config: Callable[..., Path],
    oblong_model: Callable[..., str],
    colours: Path,
    tmp_path: Path,
    cache: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(write_config(student={"model": oblong_model(32, 16)}))
    overrides = ["data.views=2", f"teacher_cache.folder={tmp_path / 'embeddings'}"] if cache else []
    if cache:
        assert main(["cache", "--config", config, *overrides]) == 0
    assert main(["estimate", "--config", config, "--no-sweep", *overrides]) == 0
    assert main(["train", "--config", config, *overrides]) == 0
    found = re.search(r"zero-shot acc1 ([0-9.]+)%", capsys.readouterr().out)
    assert found

    def evaluated(model: Path) -> str:
        result = str(tmp_path / "result.json")
        assert main(["evaluate", "--model", str(model), "--data", str(colours / "set"), "--output", result]) == 0
        return f"{json.loads(Path(result).read_text())['metrics']['acc1']:.2%}"

    run, export = tmp_path / "run", tmp_path / "export"
    assert evaluated(run) == f"{found[1]}%"
    assert main(["report", str(run), "--output", str(tmp_path / "report.html"), "--examples", "4"]) == 0
    command = ["export", "--checkpoint", str(run), "--output", str(export), "--formats", "open_clip", "onnx"]
    assert main([*command, "--images", "4"]) == 0
    assert "16 x 32 pixels" in (export / "README.md").read_text()
    assert evaluated(export) == f"{found[1]}%"
