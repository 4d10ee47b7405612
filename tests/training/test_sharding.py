"""A teacher whose image tower is shared out over the ranks, in real processes."""

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import Runs, assert_identical

pytestmark = pytest.mark.slow


def _encode(rank: int, port: int, folder: str, precision: str, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from clipdistill.models.loading import load_frozen_model

    tower = load_frozen_model(f"local-dir:{folder}", precision=precision)
    image_BCHW = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    whole_BD = tower.encode_image(image_BCHW)
    tower.shard(torch.device("cpu"))
    sharded_BD = tower.encode_image(image_BCHW)
    again_BD = tower.encode_image(image_BCHW)
    visual = tower.clip.visual
    parameters = list(visual.parameters())
    results.put(
        {
            "difference": float((whole_BD - sharded_BD).abs().max()),
            "same twice": torch.equal(sharded_BD, again_BD),
            "sharded": all(isinstance(parameter, DTensor) for parameter in parameters),
            "units": sum(isinstance(module, FSDPModule) for module in visual.modules()),
            "root": isinstance(visual, FSDPModule),
            "share": sum(parameter.to_local().numel() for parameter in parameters) / sum(p.numel() for p in parameters),
        }
    )
    results.close()
    results.join_thread()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("bf16", 0.02)])
def test_blocks_and_root_are_shared_out(teacher_folder: Path, precision: str, bound: float) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (port, str(teacher_folder), precision, results)
    processes = [context.Process(target=_encode, args=(rank, *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = [results.get(timeout=90) for _ in processes]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    for each in found:
        assert each["difference"] < bound
        assert (each["same twice"], each["sharded"], each["root"], each["units"]) == (True, True, True, 3)
    assert sum(each["share"] for each in found) == pytest.approx(1)
    assert all(0.3 < each["share"] < 0.7 for each in found)


def test_a_run_with_a_shared_out_teacher_is_the_same_run(
    colours: Path, tiny_model: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    runs = Runs(tmp_path, colours=colours, student=tiny_model, teacher=teacher_folder)
    plain = "train.channels_last=false"  # a sharded teacher has no other layout
    whole = runs.whole(plain, ranks=2)
    job = runs.start("sharded", plain, "teachers.0.shard=true", ranks=2)
    assert job.wait() == [0, 0], job.text()
    assert_identical(whole, tmp_path / "sharded")
