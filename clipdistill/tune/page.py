"""What a study leaves: the best config, all trials as JSON, and a page with plots."""

import json
from typing import Any

import yaml  # type: ignore[import-untyped]

from clipdistill.io.files import write_json, write_text, writing
from clipdistill.report.html import plot_div, render_page
from clipdistill.settings import differences
from clipdistill.tune.study import TRIALS_FOLDER, Study

BEST_FILE = "best.yaml"
TRIALS_FILE = "trials.json"
PAGE_FILE = "tune.html"


def write_results(study: Study) -> str:
    """Write the files of a study that has a trial with a result; returns a summary.

    Raises:
        InputError: no trial has a result.
        RunError: a file could not be written.
    """
    best, output, search = study.best, study.search.output, study.search
    settings = study.settings_of(best)
    edges = search.space.edges(settings)
    config = search.config_with(settings, output=output / "best")
    head = [
        f"Best of {len(study.trials)} trials of clipdistill tune ({study.stopped} stopped early), by {study.metric}: "
        f"{best.value:.4f}, on the validation sets alone.",
        "States what differs from the defaults.",
        *(f"{key}: searched over {text}" for key, text in search.space.to_dict().items()),
        *edges,
    ]
    comment = "".join(f"# {line}\n" for line in head)
    with writing(f"--output {output}", output):
        write_text(output / BEST_FILE, comment + "\n" + yaml.safe_dump(differences(config), sort_keys=False))
        write_json(
            output / TRIALS_FILE, {"metric": study.metric, "space": search.space.to_dict(), "trials": _trials(study)}
        )
        write_text(output / PAGE_FILE, _page(study, edges))
    lines = [
        f"best: {study.metric} {best.value:.4f}, " + " ".join(f"{key}={json.dumps(settings[key])}" for key in settings),
        *edges,
        f"{len(study.trials)} trials, {study.stopped} stopped early",
        f"config: {output / BEST_FILE}",
        f"its run: {output / TRIALS_FOLDER / best.user_attrs['folder']}",
        f"all trials: {output / TRIALS_FILE}, {output / PAGE_FILE}",
    ]
    return "\n".join(lines)


def _trials(study: Study) -> list[dict[str, Any]]:
    return [
        {
            "number": trial.number,
            "value": None if "stopped" in trial.user_attrs else trial.value,
            "settings": study.settings_of(trial),
            "evaluations": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
            "stopped": trial.user_attrs.get("stopped"),
            "seconds": trial.user_attrs.get("seconds"),
            "run": f"{TRIALS_FOLDER}/{trial.user_attrs['folder']}",
        }
        for trial in study.trials
    ]


def _page(study: Study, edges: list[str]) -> str:
    from optuna import visualization

    of_optuna = study.optuna_study
    plots = {
        "Trials": visualization.plot_optimization_history(of_optuna, target_name=study.metric),
        "Evaluations of each trial": visualization.plot_intermediate_values(of_optuna),
        "Each setting": visualization.plot_slice(of_optuna, target_name=study.metric),
        "Settings together": visualization.plot_parallel_coordinate(of_optuna, target_name=study.metric),
    }
    best = study.best
    return render_page(
        "clipdistill.tune",
        name=study.search.output.resolve().name,
        metric=study.metric,
        value=best.value,
        settings=study.settings_of(best),
        space=study.search.space.to_dict(),
        edges=edges,
        trials=_trials(study),
        plots=[{"title": title, "plot": plot_div(figure)} for title, figure in plots.items()],
    )
