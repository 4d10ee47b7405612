"""A comparison from its first check to its figures. Each stage goes on where an earlier call was stopped.

OUTPUT/
    embeddings/, embeddings-captions/     teacher caches that all runs share
    pilot/ARM/seed-S/       runs from which the detectable difference is estimated
    tune/ARM/               the search of an arm: as ``clipdistill tune`` leaves it
    runs/ARM/seed-S/        runs with the chosen settings
    tested/ARM-S.json       about which test images a run is right
    results.json, table.md, compare.html

Test sets are opened at the beginning, to compare their images with all others, and used once all runs have ended.

Shapes: S seeds, N test images.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipdistill import __version__
from clipdistill.compare.arms import CompareSettings
from clipdistill.compare.combine import (
    PLAIN_MEASURE,
    Correct,
    Images,
    accuracy_by_shot,
    command_line,
    compare_arms,
    pack,
)
from clipdistill.compare.overlap import check_no_overlap
from clipdistill.compare.statistics import (
    best_p,
    detectable_over_images,
    detectable_over_seeds,
)
from clipdistill.config import Config
from clipdistill.data import ShardIndex
from clipdistill.errors import InputError
from clipdistill.evaluation import EvaluationSet, load_for_evaluation, predict
from clipdistill.evaluation.attack import ROBUST, AttackSettings, robust_hits, shown_radius
from clipdistill.evaluation.classification import top1_hits
from clipdistill.evaluation.evaluate import Evaluator
from clipdistill.evaluation.sets.open import open_sets
from clipdistill.io.files import write_json
from clipdistill.io.jsonl import read_jsonl
from clipdistill.io.machine import describe_machine
from clipdistill.io.manifest import fingerprints
from clipdistill.io.paths import expand
from clipdistill.io.run_files import IDENTITY_FILE, METRICS_FILE
from clipdistill.models.class_counts import SHOTS, shot_of
from clipdistill.models.embedding_table import EMBEDDINGS
from clipdistill.training.build import index_all, open_evaluation_sets, uses_teacher_captions
from clipdistill.training.identity import Identity, read_identity
from clipdistill.training.trainer import train
from clipdistill.tune.caching import cache_settings, complete_cache
from clipdistill.tune.page import write_results
from clipdistill.tune.study import Search, Study


class ArmsComparison:
    """The stages of a comparison.

    Args:
        settings: the arms.
        progress: called with one line about each step.

    Raises:
        InputError: an arm is invalid, its folder holds another search, or a test set is no classification set.
    """

    def __init__(self, settings: CompareSettings, *, progress: Callable[[str], None]) -> None:
        self.settings = settings
        self._progress = progress
        self._searches = {arm: self._search(arm) for arm in settings.arms}
        self._configs = {arm: search.config_with({}, output=search.output) for arm, search in self._searches.items()}
        first = next(iter(self._configs.values()))
        cache = expand(first.data.cache)
        self.validation = open_evaluation_sets(first, cache=cache)
        self.test = open_sets(settings.test, first.evaluation, cache=cache, counts_must_fit=False)
        for arm, config in self._configs.items():
            if (config.evaluation, config.train.best_metric) != (first.evaluation, first.train.best_metric):
                raise InputError(
                    f"arms.{arm}: evaluation or train.best_metric differs; allowed: one choice for all arms"
                )
        for data in (*self.test, *self.validation):
            if data.kind != "classification":
                raise InputError(f"test, evaluation.folders: {data.name} is for {data.kind}; allowed: classification")
        attack = first.evaluation.attack
        self._attack = None if attack is None else AttackSettings.of(attack)
        metric = first.train.best_metric
        if attack is not None and not metric.endswith(ROBUST):
            raise InputError(
                f"train.best_metric: {metric}; allowed with evaluation.attack: evaluation/SET{ROBUST}, so that "
                "settings are chosen by what is compared"
            )
        self._identities = {id(data): data.identity() for data in (*self.test, *self.validation)}
        self._students: dict[tuple[str, int], Path] = {}
        self._studies = {arm: Study(search) for arm, search in self._searches.items()}

    def run(self) -> dict[str, Any]:
        """All stages; returns the content of ``results.json``.

        Raises:
            InputError: a test image is also one of training or validation; or as ``train``.
            Interrupted: SIGTERM or SIGINT; the same call goes on.
        """
        self.prepare()
        power = self.forecast()
        for arm, study in self._studies.items():
            study.run(progress=lambda line, arm=arm: self._progress(f"{arm}: {line}"))  # type: ignore[misc]
            write_results(study)
        for arm in self.settings.arms:
            for seed in self.seeds:
                self._progress(f"{arm}: seed {seed}: {self._train(arm, seed)}")
        return self._results(power)

    def prepare(self) -> None:
        """Compare the test images with all others, and build the teacher caches."""
        self._check_overlap()
        for config in self._configs.values():
            complete_cache(config)

    @property
    def seeds(self) -> list[int]:
        """Seeds of the final runs: others than those of the searches and the pilot runs."""
        first = max(config.seed for config in self._configs.values()) + 1 + self.settings.pilot
        return list(range(first, first + self.settings.seeds))

    def forecast(self) -> dict[str, Any]:
        """Which difference the comparison can show: from pilot runs of two arms, on the validation sets."""
        settings = self.settings
        pairs = max(1, len(settings.pairs))
        found: dict[str, Any] = {
            "seeds": settings.seeds,
            "comparisons": pairs,
            "best_p": best_p(settings.seeds, pairs),
            "test_images": sum(map(self._images, self.test)),
            "validation_images": sum(map(self._images, self.validation)),
        }
        if settings.pilot and len(settings.arms) > 1:
            names = list(settings.arms)[:2]
            correct = {arm: self._pilot(arm) for arm in names}
            difference_S = correct[names[0]].mean(1) - correct[names[1]].mean(1)
            discordant = float((correct[names[0]] != correct[names[1]]).mean())
            found |= {
                "pilot": {arm: correct[arm].mean(1).tolist() for arm in names},
                "spread": float(difference_S.std(ddof=1)),
                "discordant": discordant,
                "detectable_over_seeds": detectable_over_seeds(
                    difference_S.tolist(), seeds=settings.seeds, comparisons=pairs
                ),
                "detectable_over_images": detectable_over_images(
                    found["test_images"], discordant=discordant, comparisons=pairs
                ),
                "detectable_in_validation": detectable_over_images(found["validation_images"], discordant=discordant),
            }
        self._progress(describe_power(found))
        return found

    def _search(self, arm: str) -> Search:
        settings = self.settings
        search = settings.search(arm, {})
        config = search.config_with({}, output=search.output)
        folder = settings.folder / ("embeddings-captions" if uses_teacher_captions(config) else "embeddings")
        cached = cache_settings(config, search.space, folder=folder, views=settings.views)
        views = {"data.views": config.data.views or settings.views}  # the same in all arms, cached or not
        return replace(search, values={**search.values, **views, **cached})

    def _check_overlap(self) -> None:
        index: dict[str, ShardIndex] = {}
        for config in self._configs.values():
            index |= {shard.url: shard for shard in index_all(config)}
        check_no_overlap(self.test, training=list(index.values()), validation=self.validation)

    def _pilot(self, arm: str) -> Correct:
        """Which validation images the pilot runs of an arm get right (S, N)."""
        found = []
        for number in range(self.settings.pilot):
            seed = self._configs[arm].seed + 1 + number
            output = self.settings.folder / "pilot" / arm / f"seed-{seed}"
            self._progress(f"pilot: {arm}: seed {seed}")
            config = self._searches[arm].config_with({"seed": seed}, output=output)
            found.append(self._correct(train(config, resume="auto").student, self.validation, f"pilot-{arm}-{seed}"))
        return np.stack(found)

    def _config(self, arm: str, seed: int) -> Config:
        study = self._studies[arm]
        settings = {**study.settings_of(study.best), "seed": seed}
        return self._searches[arm].config_with(settings, output=self._folder(arm, seed))

    def _folder(self, arm: str, seed: int) -> Path:
        return self.settings.folder / "runs" / arm / f"seed-{seed}"

    def _train(self, arm: str, seed: int) -> Path:
        """Run an arm's chosen settings, unless that was done; returns the student."""
        if (arm, seed) not in self._students:
            self._students[arm, seed] = train(self._config(arm, seed), resume="auto").student
        return self._students[arm, seed]

    def _correct(self, student: Path, sets: Sequence[EvaluationSet], name: str) -> Correct:
        """Which images of some sets a student gets right (N,); kept in a file, by the content of both."""
        attack = self._attack and self._attack.described()
        made_of = [fingerprints(student), [self._identities[id(data)] for data in sets], attack]
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        path = self.settings.folder / "tested" / f"{name}.json"
        try:
            stored = json.loads(path.read_bytes())
            if stored["made_of"] == key:
                return np.array(stored["correct"], bool)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        correct_N = self._measure(str(student), "", sets)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"made_of": key, "correct": correct_N.astype(int).tolist()})
        return correct_N

    def _results(self, power: dict[str, Any]) -> dict[str, Any]:
        """Measure all runs on the test sets, and compare the arms."""
        settings = self.settings
        correct = {
            arm: np.stack([self._correct(self._train(arm, seed), self.test, f"{arm}-{seed}") for seed in self.seeds])
            for arm in settings.arms
        }
        teacher = self._teacher()
        identity = self._identity_of_a_run()
        shots = self._shots()
        return {
            "command": command_line(),
            "machine": describe_machine(),
            "versions": {"clipdistill": __version__, "torch": torch.__version__},
            "measure": self._measured,
            "test": self._describe(self.test),
            "validation": self._describe(self.validation),
            "shards": identity["shards"],
            "teachers": identity["teachers"],
            "shared": settings.shared,
            "seeds": self.seeds,
            "trials": settings.trials,
            "against": settings.against,
            "power": power,
            "teacher": teacher,
            "shots": {shot: pack(among_N[None])[0] for shot, among_N in shots.items()},
            "arms": {
                arm: self._arm(arm, correct[arm], teacher) | {"shots": accuracy_by_shot(correct[arm], shots)}
                for arm in settings.arms
            },
            "comparisons": compare_arms(correct, settings.pairs, shots),
        }

    def _shots(self) -> dict[str, Images]:
        """Which test images are of classes with many, a medium number of, and few training samples (N,); empty if the
        numbers are not known, and without the shots that have no image."""
        found = []
        for data in self.test:
            if data.class_counts is None or self._attack is not None:
                return {}
            found += [shot_of(data.class_counts[sample.label]) for sample in data.samples()]
        masks = {shot: np.array([each == shot for each in found]) for shot in SHOTS}
        return {shot: among_N for shot, among_N in masks.items() if among_N.any()}

    def _describe(self, sets: Sequence[EvaluationSet]) -> list[dict[str, Any]]:
        return [
            {"name": data.name, "images": self._images(data), "identity": self._identities[id(data)]} for data in sets
        ]

    def _images(self, data: EvaluationSet) -> int:
        """Number of images of a set that are measured."""
        return len(data) if self._attack is None else min(len(data), self._attack.images)

    @property
    def _measured(self) -> str:
        """What is compared, in words."""
        if self._attack is None:
            return PLAIN_MEASURE
        attack = self._attack
        return f"{PLAIN_MEASURE} under {attack.attack.upper()}, {attack.norm}, {shown_radius(attack.radii[-1])}"

    def _identity_of_a_run(self) -> Identity:
        """What a run was made of, of an arm with a teacher if there is one."""
        with_teacher = [arm for arm, config in self._configs.items() if config.teachers]
        folder = self._folder((with_teacher or list(self._configs))[0], self.seeds[0])
        identity = read_identity(folder / IDENTITY_FILE)
        if identity is None:
            raise InputError(f"{folder / IDENTITY_FILE}: missing; allowed: a run's folder as it was left")
        return identity

    def _arm(self, arm: str, correct_SN: Correct, teacher: float | None) -> dict[str, Any]:
        study = self._studies[arm]
        accuracies = correct_SN.mean(1).tolist()
        chosen = study.settings_of(study.best)
        mean = float(np.mean(accuracies))
        return {
            "settings": chosen,
            "edges": self._searches[arm].space.edges(chosen),
            "validation": study.best.value,
            "trials": len(study.trials),
            "stopped_trials": study.stopped,
            "accuracy": accuracies,
            "mean": mean,
            "standard_deviation": float(np.std(accuracies, ddof=1)),
            "share_of_teacher": mean / teacher if teacher else None,
            "seconds_of_tuning": sum(trial.user_attrs["seconds"] for trial in study.trials),
            "seconds_of_a_run": float(
                np.mean([seconds_of(self._folder(arm, seed), self._config(arm, seed)) for seed in self.seeds])
            ),
            "search": str(self._searches[arm].output),
            "runs": [str(self._folder(arm, seed)) for seed in self.seeds],
            "correct": pack(correct_SN),
        }

    def _teacher(self) -> float | None:
        """Accuracy of the first arm's first teacher on the test sets; None without a teacher that has a model."""
        teachers = [config.teachers[0] for config in self._configs.values() if config.teachers]
        if not teachers or teachers[0].model.startswith(EMBEDDINGS):
            return None
        return float(self._measure(teachers[0].model, teachers[0].pretrained, self.test).mean())

    def _measure(self, model: str, pretrained: str, sets: Sequence[EvaluationSet]) -> Correct:
        """Which images of some sets a model gets right, or under attack keeps right (N,)."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tower = load_for_evaluation(model, pretrained, device=device)
        if self._attack is not None:
            evaluator = Evaluator(tower, batch_size=256, workers=0, device=device)
            return torch.cat([robust_hits(evaluator, data, self._attack) for data in sets]).numpy()
        hits = [top1_hits(predict(tower, data, device=device)) for data in sets]
        return torch.cat(hits).cpu().numpy()


def describe_power(power: dict[str, Any]) -> str:
    """What a forecast says, in one line."""
    line = (
        f"power: {power['seeds']} seeds, {power['comparisons']} comparisons: p can be {power['best_p']:.3f} at best; "
        f"{power['test_images']:,} test images, {power['validation_images']:,} of validation"
    )
    if "pilot" not in power:
        return line
    return (
        f"{line}; pilot: the difference of two arms varies by {power['spread'] * 100:.2f} points between seeds, and "
        f"they disagree about {power['discordant']:.0%} of the images. With a probability of 80 % are shown: "
        f"{power['detectable_over_seeds'] * 100:.2f} points over seeds, "
        f"{power['detectable_over_images'] * 100:.2f} over test images; "
        f"a choice by validation sees {power['detectable_in_validation'] * 100:.2f} points"
    )


def seconds_of(run: Path, config: Config) -> float:
    """Time that the steps of a run took, by its metrics."""
    seconds, before = 0.0, 0
    for record in read_jsonl(run / METRICS_FILE):
        if "samples_per_second" in record:
            samples = (record["step"] - before) * config.data.batch_size * config.train.accumulate
            seconds, before = seconds + samples / record["samples_per_second"], record["step"]
    return seconds
