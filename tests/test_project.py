"""What surrounds the code: the wheel, the launch files, the recipes' headers, the commands' help."""

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import open_clip
import pytest

from clipdistill.compare.arms import read_arms
from clipdistill.config import load_config, to_dict

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ACCELERATE = ROOT / "configs" / "accelerate"
COMMANDS = ("quickstart", "estimate", "cache", "train", "evaluate", "export", "report", "shards")


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, **options)


# The wheel.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.parametrize("folder", ["prompts", "configs", "weights"])
def test_the_wheel_carries_every_file_of(wheel: Path, folder: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    expected = {
        f"clipdistill/resources/{file.relative_to(ROOT).as_posix()}": file.stat().st_size
        for file in (ROOT / folder).rglob("*")
        if file.is_file()
    }
    assert expected.items() <= sizes.items()


def test_an_unpacked_wheel_finds_its_prompts_and_configs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = """
from clipdistill.config import load_config, to_dict
from clipdistill.io.resources import resource
from clipdistill.models.prompts import load_prompts
assert "site" in str(resource("configs")), resource("configs")
config = load_config(resource("configs", "quickstart.yaml"))
print(load_prompts("imagenet-1k").num_classes, load_prompts(config.prompts).num_classes)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = run(sys.executable, "-c", program, cwd=tmp_path, env=environment)
    assert done.stdout == "1000 240\n", done.stderr


# The commands.


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_of_every_command(command: str) -> None:
    done = run(sys.executable, "-m", "clipdistill", *command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: clipdistill {command}".rstrip())
    assert all(name in done.stdout for name in (COMMANDS if not command else ()))


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in COMMANDS else pytest.mark.slow)
        for path in sorted((ROOT / "scripts").glob("*.py"))
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")  # jobs.py is imported by others
    ],
)
def test_help_of_every_script(script: Path, tmp_path: Path) -> None:
    done = run(sys.executable, script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate.commands.launch", "torch.distributed.run"])
def test_launchers_run_the_package(launcher: str) -> None:
    arguments = ["--cpu", "--num_processes", "1"] if "accelerate" in launcher else ["--nproc_per_node", "1"]
    done = run(sys.executable, "-m", launcher, *arguments, "-m", "clipdistill", "cache", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: clipdistill cache")


# The recipes.


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_commands_in_a_config_header_name_what_exists(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    named = re.findall(r"\b(?:configs|scripts)/[\w/.-]+\w", header)
    assert f"configs/{path.name}" in named or path.name == "quickstart.yaml"
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "quickstart"], ids=lambda path: path.stem)
def test_overrides_that_shrink_a_run_are_accepted(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[0].replace("\n#", "\n")
    small = re.search(r"^ (?:Small|To try it in seconds):(.*)", header, re.DOTALL | re.MULTILINE)
    assert small
    overrides = [word for word in shlex.split(small[1].replace("\\\n", " ")) if "=" in word]
    assert overrides
    config = load_config(path, overrides)
    assert config.train.steps is not None
    assert config.train.steps <= 1000
    assert config.optimizer.warmup_steps <= max(100, config.train.steps // 5)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_arms_differ_in_the_signal_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = read_arms(path)
    arms = {name: to_dict(settings.search(name, {}).config_with({}, output=Path("x"))) for name in settings.arms}
    first = next(arm for arm in arms.values() if arm["teachers"])
    for name, arm in arms.items():
        signal = {"objective", "labels"} if arm["teachers"] else {"objective", "teachers", "student", "teacher_cache"}
        chosen = {"optimizer"} if settings.trials == 1 else set()  # what a search has chosen is stated
        assert {key for key in arm if arm[key] != first[key]} <= signal | chosen, name
        assert arm["student"]["model"] == first["student"]["model"]


# The launch files.


@pytest.mark.parametrize(
    ("name", "machines", "processes"),
    [("one_gpu", 1, 1), ("eight_gpus", 1, 8), ("multi_node", 2, 16), ("fsdp2", 1, 8)],
)
def test_accelerate_reads_the_launch_files(name: str, machines: int, processes: int) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.distributed_type == ("MULTI_GPU" if processes > 1 else "NO")


SRUN = """#!/usr/bin/env bash
shift
for ((SLURM_NODEID = 0; SLURM_NODEID < SLURM_NNODES; SLURM_NODEID++)); do
    export SLURM_NODEID
    "$@" &
done
trap 'kill $(jobs -p)' TERM
wait
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'node-a\\nnode-b\\n'; else echo "$@" >> scontrol.log; fi
"""


def slurm(tmp_path: Path, accelerate: str, *arguments: str) -> subprocess.Popen[str]:
    """Start slurm.sh as the batch step of job 123: two nodes of four GPUs, stand-ins for the outside programs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "accelerate": accelerate}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "GPUS_PER_NODE": "4",
    }
    return subprocess.Popen(
        ["bash", str(ACCELERATE / "slurm.sh"), *arguments],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_slurm_script_launches_every_node_with_arguments_that_accelerate_takes(tmp_path: Path) -> None:
    from accelerate.commands.launch import launch_command_parser

    record = '#!/usr/bin/env bash\nshift\nprintf "%s\\0" "$@" > "node-$SLURM_NODEID"\n'
    record += 'echo "$SRUN_CPUS_PER_TASK" > cores\n'
    job = slurm(tmp_path, record, "my config.yaml", "optimizer.lr=1e-4", "data.shards=[a, b]")
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 0, errors
    assert (tmp_path / "cores").read_text() == "64\n"
    for node in (0, 1):
        words = (tmp_path / f"node-{node}").read_text().split("\0")[:-1]
        args = launch_command_parser().parse_args(words)
        assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 8, node)
        assert args.main_process_ip == "node-a"
        assert (ROOT / args.config_file).is_file()
        assert (ROOT / args.training_script).is_file()
        assert args.training_script_args == [
            *("--config", "my config.yaml", "--resume", "auto"),
            *("optimizer.lr=1e-4", "data.shards=[a, b]"),
        ]


@pytest.mark.parametrize(
    ("sent", "code", "requeued"), [(signal.SIGUSR1, 0, "requeue 123\n"), (signal.SIGTERM, 143, "")]
)
def test_slurm_script_stops_the_run_and_requeues_only_at_the_time_limit(
    tmp_path: Path, sent: signal.Signals, code: int, requeued: str
) -> None:
    (tmp_path / "scontrol.log").touch()
    wait_for_term = (
        "#!/usr/bin/env bash\n"
        "trap 'touch \"stopped-$SLURM_NODEID\"; exit 143' TERM\n"
        'touch "started-$SLURM_NODEID"\n'
        "for ((i = 0; i < 600; i++)); do sleep 0.1; done\n"
    )
    job = slurm(tmp_path, wait_for_term, "config.yaml")
    deadline = time.monotonic() + 30
    while not all((tmp_path / f"started-{node}").exists() for node in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(sent)
    job.communicate(timeout=30)
    assert job.returncode == code
    assert (tmp_path / "scontrol.log").read_text() == requeued
    assert all((tmp_path / f"stopped-{node}").exists() for node in (0, 1))


def test_readmes_own_config_loads_and_its_pair_of_models_fits(tmp_path: Path) -> None:
    """The config that a newcomer copies: it loads, and the student takes the teacher's text tower."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = textwrap.dedent(re.search(r"```yaml\n(.*?)```", readme, re.DOTALL).group(1))
    (tmp_path / "photos.yaml").write_text(block, encoding="utf-8")
    config = load_config(tmp_path / "photos.yaml")
    (teacher,) = config.teachers
    assert teacher.pretrained in open_clip.list_pretrained_tags_by_model(teacher.model)
    models = (teacher.model, config.student.model)
    assert len({open_clip.get_model_config(name).get("quick_gelu", False) for name in models}) == 1
