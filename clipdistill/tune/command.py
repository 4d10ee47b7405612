"""``clipdistill tune``: its arguments and the search."""

import argparse
import os
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.io.arguments import not_negative, path, positive
from clipdistill.io.packages import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``run``."""
    parser.add_argument(
        "--config", required=True, type=path, help="YAML file with validation sets in evaluation.folders"
    )
    parser.add_argument(
        "--trials",
        required=True,
        type=positive,
        metavar="N",
        help="number of trials, earlier and other processes' included",
    )
    parser.add_argument("--output", type=path, default=Path("tune"), help="folder of the study (default: %(default)s)")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the search (default: %(default)s)")
    cached = parser.add_mutually_exclusive_group()
    cached.add_argument(
        "--views",
        type=positive,
        default=8,
        metavar="K",
        help="augmentations of each image in the teacher cache of all trials (default: %(default)s)",
    )
    cached.add_argument("--online", action="store_true", help="run the teachers in every step: no teacher cache")
    parser.add_argument(
        "overrides",
        nargs="+",
        metavar="KEY=SPACE|KEY=VALUE",
        help="searched settings: log(LOW, HIGH), uniform(LOW, HIGH), int(LOW, HIGH), choice(A, B, ...), "
        "tied(EXPRESSION of searched ones); and fixed ones. Such as: 'optimizer.lr=log(1e-4, 1e-2)' "
        "'objective.0.temperature=log(0.5, 16)' 'objective.0.alpha=tied(objective.0.temperature^2)' train.steps=400",
    )


def check_start(command: str, *packages: str, allowed: str) -> None:
    """Check that what a search needs is installed, and that no launcher has started it.

    Raises:
        InputError: otherwise.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"{command}: started by a launcher; allowed: {allowed}")
    require(command, "optuna", "plotly", *packages, extra="tune")


def run(args: argparse.Namespace) -> None:
    """Search, and write the best config and a page.

    Raises:
        InputError: the config, the space or the folder are invalid, or a package is missing.
        RunError: the disk is full.
    """
    from clipdistill.distributed.signals import Interruption

    check_start("tune", allowed="one process a study and device, several of which share an --output")
    with Interruption():
        from clipdistill.config import load_config
        from clipdistill.tune.caching import cache_settings, complete_cache
        from clipdistill.tune.page import write_results
        from clipdistill.tune.space import split_arguments
        from clipdistill.tune.study import Search, Study

        space, overrides = split_arguments(args.overrides)
        values: dict[str, Any] = {}
        if not args.online:
            config = load_config(args.config, overrides)
            values = cache_settings(config, space, folder=args.output / "embeddings", views=args.views)
        search = Search(
            config=args.config,
            overrides=overrides,
            values=values,
            space=space,
            output=args.output,
            trials=args.trials,
            seed=args.seed,
        )
        study = Study(search)
    complete_cache(search.config_with({}, output=args.output))
    study.run(progress=lambda line: print(line, flush=True))
    print(write_results(study))
