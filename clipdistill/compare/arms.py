"""What is compared: the arms, their search spaces, the seeds and the test sets, as a YAML file states them.

output: runs/compare
config: configs/icons-kl.yaml                 what all arms share; its evaluation.folders are the validation sets
settings: {train.steps: 400}                  changes to it, by dotted key
space: {optimizer.lr: "log(5e-4, 1e-2)"}      searched in every arm
test: [data/icons]
trials: 16
seeds: 8
arms:
  kl: {settings: {objective: [{loss: kl}]}, space: {objective.0.temperature: "log(0.5, 16)"}}
  gkl: {settings: {objective: [{loss: gkl}]}, space: {objective.0.gamma: "uniform(0, 1)"}}
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import Field, field_validator

from clipdistill.compare.statistics import LEAST_SEEDS, seeds_needed
from clipdistill.errors import InputError
from clipdistill.io.paths import read_text
from clipdistill.settings import Count, CountOrZero, LocalPath, Settings, validate
from clipdistill.tune.space import Space
from clipdistill.tune.study import Search

_NAME = re.compile(r"[A-Za-z0-9][\w+.-]{0,60}")


class ArmSettings(Settings):
    """One arm."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """Changes to the shared config, by dotted key."""
    space: dict[str, str] = Field(default_factory=dict)
    """Searched settings, in addition to the shared ones; as for ``clipdistill tune``."""


class CompareSettings(Settings):
    """A comparison of arms."""

    output: LocalPath
    """Folder of the comparison."""
    config: LocalPath
    """YAML file of the config that the arms share."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Changes to it, by dotted key."""
    space: dict[str, str] = Field(default_factory=dict)
    """Settings searched in every arm."""
    test: list[str] = Field(min_length=1)
    """Test sets for classification, as in ``evaluation.folders``; no trial sees them."""
    trials: Count = 16
    """Trials of each arm."""
    seeds: int = Field(default=8, ge=LEAST_SEEDS)
    """Runs of each arm with its chosen settings; each arm has the same seeds."""
    pilot: CountOrZero = 3
    """Runs of each of the first two arms, before the search, from which the detectable difference is estimated; 0, or 2
    or more."""
    views: Count = 8
    """Augmentations of each image in the teacher cache of all runs, unless the config states their number."""
    against: str = ""
    """Arm with which all others are compared; empty: all pairs are."""
    arms: dict[str, ArmSettings]

    @field_validator("arms")
    @classmethod
    def _are_arms(cls, value: dict[str, ArmSettings]) -> dict[str, ArmSettings]:
        if len(value) < 2 or not all(_NAME.fullmatch(name) for name in value):
            raise ValueError("two arms or more, whose names are letters, digits, '_', '+', '.' and '-'")
        return value

    @field_validator("pilot")
    @classmethod
    def _has_a_spread(cls, value: int) -> int:
        if value == 1:
            raise ValueError("0, or 2 or more")
        return value

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The compared arms: each with the one that it is compared with."""
        names = list(self.arms)
        if self.against:
            return [(name, self.against) for name in names if name != self.against]
        return [(one, other) for number, other in enumerate(names) for one in names[number + 1 :]]

    @property
    def folder(self) -> Path:
        """Folder of the comparison."""
        return Path(self.output)

    def search(self, arm: str, values: dict[str, Any]) -> Search:
        """The search of an arm; ``values`` are further fixed settings.

        Raises:
            InputError: its space is empty or wrong, or states a setting that the arm also fixes.
        """
        own = self.arms[arm]
        try:
            space = Space.parse({**self.space, **own.space})
        except InputError as error:
            raise InputError(f"arms.{arm}.{error}") from error
        fixed = {**self.settings, **own.settings, **values}
        both = [key for key in (*space.dimensions, *space.ties) if key in fixed]
        if both:
            raise InputError(f"arms.{arm}: {both[0]} is fixed and searched; allowed: one of the two")
        return Search(
            config=Path(self.config),
            space=space,
            output=self.folder / "tune" / arm,
            trials=self.trials,
            values=fixed,
        )


def read_arms(path: Path, overrides: Sequence[str] = ()) -> CompareSettings:
    """Read a YAML file of arms; ``overrides`` replace its top-level keys.

    Raises:
        InputError: it cannot be read, or is invalid.
    """
    try:
        stated = yaml.safe_load(read_text(path, what="arms"))
        changes = {}
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise InputError(f"override {override!r}: no '='; allowed: key=value")
            changes[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"arms {path}: not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(stated, dict):
        raise InputError(f"arms {path}: a {type(stated).__name__}; allowed: a mapping of keys")
    settings = validate(CompareSettings, {**stated, **changes})
    if settings.against and settings.against not in settings.arms:
        raise InputError(f"against: {settings.against!r} is not allowed; allowed: {', '.join(settings.arms)}")
    needed = seeds_needed(len(settings.pairs))
    if settings.seeds < needed:
        raise InputError(
            f"seeds: {settings.seeds} is not allowed; allowed: {needed} or more, as an exact test with fewer can show "
            f"nothing in {len(settings.pairs)} comparisons (or name one arm in `against`, or compare fewer)"
        )
    return settings
