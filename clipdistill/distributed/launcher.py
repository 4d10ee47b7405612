"""What the launcher of this process was asked for, compared with what it started.

``accelerate launch --cpu --num_processes 2`` starts one process, without a word: a run with half the global batch.
"""

import os
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError

_LAUNCH_MODULES = ("accelerate.commands.launch", "accelerate-launch")


def check_number_of_processes() -> None:
    """Check that Accelerate's launcher, if one has started this process, started as many as it was asked for.

    Raises:
        InputError: it started another number.
    """
    asked = _asked_of_accelerate(_command_of(os.getppid()))
    came = int(os.environ.get("WORLD_SIZE", "1"))
    if asked is not None and asked != came:
        remedy = "--multi_gpu, or on CPUs torchrun" if came == 1 else "the same number"
        raise InputError(
            f"accelerate launch: num_processes {asked}, but it has started {came}; allowed: {remedy}, "
            f"or --num_processes {came}"
        )


def _command_of(pid: int) -> list[str]:
    """Command line of a process, empty where it cannot be known."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _asked_of_accelerate(command: list[str]) -> int | None:
    """The number of processes in a command line of ``accelerate launch`` or in its config file; None: another command,
    or no number."""
    arguments = None
    for at, word in enumerate(command[:4]):
        if Path(word).name in _LAUNCH_MODULES or word.endswith("accelerate/commands/launch.py"):
            arguments = command[at + 1 :]
        elif Path(word).name == "accelerate" and command[at + 1 : at + 2] == ["launch"]:
            arguments = command[at + 2 :]
    if arguments is None:
        return None
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    parsed, _ = launch_command_parser().parse_known_args(arguments)
    found: Any = parsed.num_processes
    if found is None and (parsed.config_file is not None or Path(default_config_file).is_file()):
        found = getattr(load_config_from_file(parsed.config_file), "num_processes", None)
    return found if isinstance(found, int) and found > 0 else None
