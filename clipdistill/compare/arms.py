"""What is compared: the arms, their search spaces, the seeds and the test sets, as a YAML file states them.

output: runs/compare
config: configs/quickstart.yaml               what all arms share; its evaluation.folders are the validation sets
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

_PLACES = frozenset(
    (
        "output",
        "data.shards",
        "data.cache",
        "data.workers",
        "evaluation.folders",
        "evaluation.class_counts",
        "teacher_cache.folder",
        "train.threads",
        "train.trackers",
    )
)
"""Settings that may differ between the machines of a comparison's parts: what lies there is compared by content."""

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
        return pairs_of(list(self.arms), self.against)

    @property
    def shared(self) -> dict[str, Any]:
        """What all arms share, as stated, without places: parts of a comparison agree in it.

        Raises:
            InputError: the config cannot be read.
        """
        config = _read_mapping(Path(self.config), what="config")
        stated = _flat(config) | _flat(self.settings)
        return {
            "settings": {key: value for key, value in sorted(stated.items()) if key not in _PLACES},
            "space": dict(self.space),
            "trials": self.trials,
            "views": self.views,
        }

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


def pairs_of(arms: Sequence[str], against: str) -> list[tuple[str, str]]:
    """Each arm with those that it is compared with: ``against``, or all before it."""
    if against:
        return [(arm, against) for arm in arms if arm != against and against in arms]
    return [(one, other) for number, other in enumerate(arms) for one in arms[number + 1 :]]


def read_arms(path: Path, overrides: Sequence[str] = (), *, only: Sequence[str] = ()) -> CompareSettings:
    """Read a YAML file of arms.

    Args:
        path: of the file.
        overrides: replace its top-level keys.
        only: names of the arms to run; empty: all.

    Raises:
        InputError: it cannot be read, or is invalid.
    """
    stated = _read_mapping(path, what="arms")
    changes = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"override {override!r}: no '='; allowed: key=value")
        with _yaml_errors(f"override {override!r}"):
            changes[key] = yaml.safe_load(text)
    settings = validate(CompareSettings, {**stated, **changes})
    if settings.against and settings.against not in settings.arms:
        raise InputError(f"against: {settings.against!r} is not allowed; allowed: {', '.join(settings.arms)}")
    check_seeds(settings.seeds, len(settings.pairs))
    unknown = [name for name in only if name not in settings.arms]
    if unknown:
        raise InputError(f"--only: {unknown[0]!r} is not allowed; allowed: {', '.join(settings.arms)}")
    if not only:
        return settings
    return settings.model_copy(update={"arms": {name: arm for name, arm in settings.arms.items() if name in only}})


def check_seeds(seeds: int, comparisons: int) -> None:
    """Check that the exact test over seeds can show anything.

    Raises:
        InputError: it cannot.
    """
    needed = seeds_needed(comparisons)
    if seeds < needed:
        raise InputError(
            f"seeds: {seeds} is not allowed; allowed: {needed} or more, as an exact test with fewer can show nothing "
            f"in {comparisons} comparisons (or name one arm in `against`, or compare fewer)"
        )


@contextmanager
def _yaml_errors(what: str) -> Iterator[None]:
    try:
        yield
    except yaml.YAMLError as error:
        raise InputError(f"{what}: not YAML: {' '.join(str(error).split())[:300]}") from error


def _read_mapping(path: Path, *, what: str) -> dict[str, Any]:
    with _yaml_errors(f"{what} {path}"):
        found = yaml.safe_load(read_text(path, what=what))
    if not isinstance(found, dict):
        raise InputError(f"{what} {path}: a {type(found).__name__}; allowed: a mapping of keys")
    return found


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        found |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return found
