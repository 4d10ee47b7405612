"""The study: trials, each a run in a folder of its own, in a database that any number of processes share.

DIR/
    study.db          optuna's study (SQLite)
    trials/HASH/      a trial's run, by the digest of its settings; without checkpoints once the trial has ended
    embeddings/       the teacher cache of all trials
    best.yaml         config of the best trial (clipdistill.tune.page writes it, and the files below)
    trials.json       all trials
    tune.html         plots

A killed trial goes on: who continues the study finds that nobody holds its lock, and takes its settings up again, in
the same folder, where the run resumes.
"""

import hashlib
import json
import logging
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from clipdistill.config import Config, load_config, settings_of_result
from clipdistill.errors import InputError
from clipdistill.evaluation.attack import ROBUST, AttackSettings
from clipdistill.evaluation.benchmark_format import named_metrics
from clipdistill.io.identity import first_difference
from clipdistill.io.lock import InUseError, Lock
from clipdistill.io.paths import expand
from clipdistill.io.run_files import CHECKPOINTS_FOLDER, IDENTITY_FILE
from clipdistill.settings import Settings, attributes_of
from clipdistill.training.build import open_evaluation_sets
from clipdistill.training.identity import read_identity
from clipdistill.training.trainer import train
from clipdistill.tune.space import Space

log = logging.getLogger(__name__)

STUDY_FILE = "study.db"
TRIALS_FOLDER = "trials"

_FORMAT = 1
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
_DIGITS = 16
_EVALUATIONS = 4
"""Evaluations of a trial where the config states no interval: hopeless trials end at one of them."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is searched.

    Attributes:
        config: file of the config.
        overrides: fixed settings.
        values: more of them, as values: of the teacher cache.
        space: the searched ones.
        output: folder of the study.
        trials: number of trials, of all processes together.
        seed: of the sampler.
    """

    config: Path | None
    space: Space
    output: Path
    trials: int
    seed: int = 0
    overrides: Sequence[str] = ()
    values: Mapping[str, Any] = field(default_factory=dict)

    def config_with(self, settings: Mapping[str, Any], *, output: Path) -> Config:
        """The config with some settings.

        Raises:
            InputError: they are invalid.
        """
        searched = [f"{key}={json.dumps(value)}" for key, value in settings.items()]  # last: nothing replaces them
        values = {**self.values, "output": str(output)}
        return load_config(self.config, [*self.overrides, *searched], values=values)

    def config_of_trial(self, settings: Mapping[str, Any], *, output: Path) -> Config:
        """The config of a trial, which is evaluated several times, and keeps little on disk."""
        train = self.config_with(settings, output=output).train
        intervals: dict[str, Any] = {"train.keep": 1, "train.keep_best": 0}
        if train.evaluate_every is None and train.steps is not None:
            intervals["train.evaluate_every"] = -(-train.steps // _EVALUATIONS)
        return self.config_with({**settings, **intervals}, output=output)


class Study:
    """The trials of a search, begun or continued.

    Args:
        search: what is searched.

    Raises:
        InputError: the space goes beyond what the config allows, there is no validation set, or the folder holds
            another study.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.folder = search.output / TRIALS_FOLDER
        base = search.config_with({}, output=search.output)
        for key in (*search.space.dimensions, *search.space.ties):
            if _setting(base, key) is None and not _is_setting(base, key):
                raise InputError(f"{key}: no setting of the config; allowed: its dotted keys")
        for corner in search.space.corners():
            config = search.config_with(corner, output=search.output)
            for key, value in corner.items():
                if not _is_stated(_setting(config, key), value):
                    raise InputError(f"{key}: has no effect, as another argument replaces it; allowed: one of the two")
        if not base.evaluation.folders:
            raise InputError(
                "evaluation.folders: empty; allowed: at least one validation set, by which trials are chosen"
            )
        self.metric, attack = base.train.best_metric, base.evaluation.attack
        validation = open_evaluation_sets(base, cache=expand(base.data.cache))
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        identity = {
            "format": _FORMAT,
            "settings": settings_of_result(base),
            "space": search.space.to_dict(),
            "metric": self.metric,
            "validation": [each.identity() for each in validation],
            "attack": None if attack is None else AttackSettings.of(attack).described(),
        }
        search.output.mkdir(parents=True, exist_ok=True)
        with self._alone():
            most = math.inf if attack is None or not self.metric.endswith(ROBUST) else attack.images
            pruner = Hopeless(images=int(sum(min(len(each), most) for each in validation)))
            self._study = _open(search.output / STUDY_FILE, pruner=pruner)
            self._check("search", identity)
            parameters = {
                key: dimension.parameter(_setting(base, key)) for key, dimension in search.space.dimensions.items()
            }
            if not self._study.get_trials(deepcopy=False) and None not in parameters.values():
                self._study.enqueue_trial(parameters)

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials that have a result, or were stopped early."""
        return self._study.get_trials(deepcopy=False, states=_ENDED)

    @property
    def best(self) -> FrozenTrial:
        """The trial with the best metric.

        Raises:
            InputError: none has one.
        """
        rated = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        if not rated:
            raise InputError(
                f"--trials: none of {len(self.trials)} trials came to its end; allowed: a space with fewer failures"
            )
        return max(rated, key=lambda trial: (trial.value, -trial.number))

    @property
    def optuna_study(self) -> optuna.Study:
        """The study, as optuna's functions take it."""
        return self._study

    @property
    def stopped(self) -> int:
        """Number of trials that were stopped early."""
        return sum(trial.state == TrialState.PRUNED for trial in self.trials)

    def settings_of(self, trial: FrozenTrial) -> dict[str, Any]:
        """The searched and tied settings of a trial."""
        return self.search.space.settings(trial.params)

    def run(self, *, progress: Callable[[str], None] = lambda _: None) -> None:
        """Run trials until there are as many as wanted, those of other processes included.

        Raises:
            InputError: the shards, teachers or prompts are not those of the study's first trial.
            Interrupted: SIGTERM or SIGINT; the same call goes on.
        """
        while (claimed := self._claim()) is not None:
            trial, lock, settings = claimed
            with lock:
                progress(self._run_one(trial, settings))

    def _run_one(self, trial: optuna.Trial, settings: Mapping[str, Any]) -> str:
        folder = self.folder / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:_DIGITS]
        trial.set_user_attr("folder", folder.name)
        config = self.search.config_of_trial(settings, output=folder)
        started = time.monotonic()
        reported: set[int] = set()

        def report(step: int, record: Mapping[str, Any]) -> None:
            value = record[self.metric]
            if value is None or step in reported:
                return
            reported.add(step)
            trial.report(value, step)
            if step < (config.train.steps or 0) and trial.should_prune():
                raise optuna.TrialPruned(f"{value:.4f} at step {step}")

        try:
            result = train(config, resume="auto", on_evaluation=report)
            value, why = named_metrics(result.evaluations)[self.metric], ""
        except (optuna.TrialPruned, FloatingPointError) as error:
            value, why = None, str(error)
        trial.set_user_attr("seconds", time.monotonic() - started)
        self._check_content(folder)
        shutil.rmtree(folder / CHECKPOINTS_FOLDER, ignore_errors=True)
        shown = " ".join(f"{key}={_short(value)}" for key, value in settings.items())
        if value is None:
            trial.set_user_attr("stopped", why)
            self._study.tell(trial, state=TrialState.PRUNED)
            return f"trial {len(self.trials)}/{self.search.trials}: stopped, {why}; {shown}"
        self._study.tell(trial, value)
        best = self.best
        return (
            f"trial {len(self.trials)}/{self.search.trials}: {self.metric} {value:.4f} (best {best.value:.4f}) in "
            f"{time.monotonic() - started:.0f} s; {shown}"
        )

    def _claim(self) -> tuple[optuna.Trial, Lock, dict[str, Any]] | None:
        """A new trial of this process, its lock, and its settings; None if there are enough."""
        with self._alone():
            for running in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                self._take_up_if_left(running)
            taken = self._study.get_trials(deepcopy=False, states=(*_ENDED, TrialState.RUNNING))
            if len(taken) >= self.search.trials:
                return None
            self._study.sampler = optuna.samplers.TPESampler(
                seed=(self.search.seed * 1_000_003 + len(taken)) % 2**32,
                n_startup_trials=min(10, max(4, self.search.trials // 3)),
            )
            trial = self._study.ask()
            lock = self._lock(trial.number)
            return trial, lock, self.search.space.suggest(trial)

    def _take_up_if_left(self, trial: FrozenTrial) -> None:
        """Queue the settings of a trial again whose process is gone."""
        try:
            self._lock(trial.number).release()
        except InUseError:
            return
        self._study.tell(trial.number, state=TrialState.FAIL)
        if trial.params.keys() == self.search.space.dimensions.keys():
            log.info("trial %d was left: it goes on", trial.number)
            self._study.enqueue_trial(trial.params)

    def _lock(self, number: int) -> Lock:
        return Lock(self.search.output / f".lock-trial-{number}", f"trial {number}")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A block that one process of the study runs at a time."""
        while True:
            try:
                lock = Lock(self.search.output / ".lock", f"--output {self.search.output}")
                break
            except InUseError:
                time.sleep(0.2)
        with lock:
            yield

    def _check_content(self, folder: Path) -> None:
        """Compare what a trial's run was made of with the first trial's."""
        identity = read_identity(folder / IDENTITY_FILE) or {}
        searched = {key.split(".")[0] for key in self.search.space.dimensions}
        content = {
            part: _digest(identity.get(part)) for part in ("prompts", "teachers", "labels") if part not in searched
        }
        if "data" not in searched:
            shards = {f"shard {number} {name}": digest for number, (name, digest) in enumerate(identity["shards"])}
            content |= {"shards": _digest(list(shards)), **{name: digest for name, digest in shards.items() if digest}}
        with self._alone():
            then = self._study.user_attrs.get("content", {})
            self._check("content", then | {name: value for name, value in content.items() if name in then or not then})

    def _check(self, name: str, now: Mapping[str, Any]) -> None:
        """Record something of the study, or compare it with what was recorded.

        Raises:
            InputError: it differs.
        """
        then = self._study.user_attrs.get(name)
        if then is None:
            self._study.set_user_attr(name, dict(now))
            return
        found = first_difference(then, json.loads(json.dumps(now)), "")
        if found is not None:
            raise InputError(
                f"--output {self.search.output}: {found.part} is {found.now}, but the study there has {found.then}; "
                "allowed: the same, or another output"
            )


class Hopeless(optuna.pruners.BasePruner):
    """Stops a trial whose metric lies below the median of all trials at the same step by more than chance explains: two
    standard errors of an accuracy on the validation images.

    Args:
        images: of validation.
        after: trials that have to end first.
    """

    def __init__(self, *, images: int, after: int = 4) -> None:
        self._images = images
        self._after = after

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether to stop a trial after its last evaluation."""
        step = trial.last_step
        others = study.get_trials(deepcopy=False, states=_ENDED)
        values = [other.intermediate_values[step] for other in others if step in other.intermediate_values]
        if step is None or len(values) < self._after:
            return False
        median = statistics.median(values)
        noise = 2 * math.sqrt(max(median * (1 - median), 0.0) / self._images + 1 / self._images**2)
        return trial.intermediate_values[step] < median - noise


def _open(path: Path, *, pruner: optuna.pruners.BasePruner) -> optuna.Study:
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 120}})
    return optuna.create_study(
        study_name="tune",
        storage=storage,
        load_if_exists=True,
        direction="maximize",
        pruner=pruner,
    )


def _setting(config: Config, key: str) -> Any:
    """A setting by its dotted key; None if it is empty, or there is none."""
    value: Any = config
    for part in key.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Settings) and part in (attributes := attributes_of(type(value))):
            value = getattr(value, attributes[part])
        else:
            return None
    return value


def _is_stated(setting: Any, value: Any) -> bool:
    """Whether a setting is what a value states; of a mapping, what it mentions."""
    if isinstance(value, list):
        return len(setting) == len(value) and all(map(_is_stated, setting, value))
    if isinstance(value, dict):
        attributes = attributes_of(type(setting))
        return all(_is_stated(getattr(setting, attributes[key]), each) for key, each in value.items())
    return bool(setting == value)


def _is_setting(config: Config, key: str) -> bool:
    """Whether there is a setting of this dotted key, which may be empty."""
    holder, _, name = key.rpartition(".")
    parent = _setting(config, holder) if holder else config
    return isinstance(parent, Settings) and name in attributes_of(type(parent))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
