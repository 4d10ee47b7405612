"""A chain of runs, such as through a teacher assistant: a stage's student may be a teacher, or the start, of the next.

Source of teacher assistants: Mirzadeh et al., Improved Knowledge Distillation via Teacher Assistant (AAAI 2020, arXiv
1902.03393).
"""

from collections.abc import Iterator, Sequence

from clipdistill.config import Config
from clipdistill.distributed.signals import Interruption
from clipdistill.errors import InputError
from clipdistill.training.run_folder import RunResult, find_start
from clipdistill.training.trainer import train


def train_stages(
    configs: Sequence[Config], *, resume: str | None, restart: bool, interruption: Interruption
) -> Iterator[RunResult]:
    """Run the stages one after another; the result of each when it is finished.

    Args:
        configs: of the stages.
        resume: as for ``train``. With ``auto`` finished stages are kept, and the first unfinished one goes on.
        restart: as for ``train``, of every stage.
        interruption: an active signal handler.

    Raises:
        InputError: as ``train``, for any stage before the first one runs where that is possible; a checkpoint's folder
            is given for several stages.
    """
    if len(configs) > 1 and resume not in (None, "auto"):
        raise InputError(f"--resume {resume}: a checkpoint, of {len(configs)} stages; allowed: auto")
    for config in configs[1:]:
        find_start(config, resume=resume, restart=restart)  # what would stop it is known before the first one runs
    for number, config in enumerate(configs):
        last = number == len(configs) - 1
        yield train(config, resume=resume, restart=restart, interruption=interruption, keep_processes=not last)
