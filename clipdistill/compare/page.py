"""The results of a comparison: as a table on the terminal, as Markdown, and as a page with every seed drawn."""

from datetime import timedelta
from typing import Any

import numpy as np
from rich.table import Table

from clipdistill.compare.combine import PLAIN_MEASURE
from clipdistill.compare.comparison import describe_power
from clipdistill.report.html import plot_div, render_page

HEADER = ("arm", "chosen settings", "seeds", "mean", "of the teacher", "tuning", "a run")


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row of texts for each arm."""
    found: list[tuple[str, ...]] = []
    for name, arm in results["arms"].items():
        chosen = " ".join(f"{_short_key(key)} {_short(value)}" for key, value in arm["settings"].items())
        share = arm["share_of_teacher"]
        found.append(
            (
                name,
                chosen,
                ", ".join(f"{value * 100:.1f}" for value in arm["accuracy"]),
                f"{arm['mean'] * 100:.2f} ± {arm['standard_deviation'] * 100:.2f} %",
                "" if share is None else f"{share:.1%}",
                str(timedelta(seconds=round(arm["seconds_of_tuning"]))),
                f"{arm['seconds_of_a_run']:.0f} s",
            )
        )
    return found


def measure_of(results: dict[str, Any]) -> str:
    """What was measured; results of earlier versions do not say."""
    return str(results.get("measure", PLAIN_MEASURE))


def text_table(results: dict[str, Any]) -> Table:
    """The arms as a table of rich."""
    table = Table(title=f"{measure_of(results)} on {_of_test(results)}")
    for column in HEADER:
        table.add_column(column)
    for row in rows(results):
        table.add_row(*row)
    return table


def markdown(results: dict[str, Any]) -> str:
    """The arms as a Markdown table, with what the comparisons show."""
    lines = [
        f"{_of_test(results)}: {measure_of(results)}; {results['trials']} trials an arm, chosen on validation; "
        f"seeds {results['seeds'][0]} to {results['seeds'][-1]}. `{results['command']}`, {results['machine']}, torch "
        f"{results['versions']['torch']}.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(row) + " |" for row in rows(results)),
        "",
        *(f"- {comparison['claim']}" for comparison in results["comparisons"]),
        *(f"- {line}" for line in by_shot(results)),
        *(f"- {arm}: {edge}" for arm, of_arm in results["arms"].items() for edge in of_arm["edges"]),
        f"- {describe_power(results['power'])}",
    ]
    return "\n".join(lines) + "\n"


def by_shot(results: dict[str, Any]) -> list[str]:
    """A line for each shot, and one for each pair of arms on it; empty if the classes' frequencies are not known."""
    lines = []
    for shot, bits in results.get("shots", {}).items():
        images = bytes.fromhex(bits)
        means = [
            f"{name} {np.mean(arm['shots'][shot]) * 100:.2f} ± {np.std(arm['shots'][shot], ddof=1) * 100:.2f} %"
            for name, arm in results["arms"].items()
        ]
        count = sum(byte.bit_count() for byte in images)
        lines.append(f"images of {shot}-shot classes ({count:,}): {', '.join(means)}")
        for pair in results["comparisons"]:
            found = pair["shots"][shot]
            lines.append(
                f"images of {shot}-shot classes, {pair['arm']} - {pair['against']}: "
                f"{found['difference'] * 100:+.2f} points [{found['low'] * 100:+.2f}, {found['high'] * 100:+.2f}]; "
                f"p = {found['p_seeds']:.3f} over seeds, {found['p_images']:.3g} over images, not corrected"
            )
    return lines


def page(results: dict[str, Any], *, name: str) -> str:
    """The results as one HTML file that needs no network."""
    plots = {"Every seed": _seeds(results), "Differences, with 95 % intervals": _differences(results)}
    return render_page(
        "clipdistill.compare",
        name=name,
        measure=measure_of(results),
        test=_of_test(results),
        header=HEADER,
        rows=rows(results),
        results=results,
        by_shot=by_shot(results),
        power=describe_power(results["power"]),
        plots=[{"title": title, "plot": plot_div(figure)} for title, figure in plots.items()],
    )


def _seeds(results: dict[str, Any]) -> Any:
    """Accuracy of every run; a line joins the runs of a seed."""
    from plotly import graph_objects as go

    arms = list(results["arms"])
    figure = go.Figure()
    for number, seed in enumerate(results["seeds"]):
        values = [results["arms"][arm]["accuracy"][number] for arm in arms]
        figure.add_scatter(x=arms, y=values, mode="lines+markers", name=f"seed {seed}", line={"width": 1})
    means = [results["arms"][arm]["mean"] for arm in arms]
    figure.add_scatter(
        x=arms, y=means, mode="markers", name="mean", marker={"symbol": "line-ew-open", "size": 26, "color": "black"}
    )
    if results["teacher"] is not None:
        figure.add_hline(y=results["teacher"], line_dash="dot", annotation_text="teacher")
    figure.update_yaxes(tickformat=".1%", title=measure_of(results))
    return figure


def _differences(results: dict[str, Any]) -> Any:
    from plotly import graph_objects as go

    figure = go.Figure()
    for pair in results["comparisons"]:
        figure.add_scatter(
            x=[100 * pair["difference"]],
            y=[f"{pair['arm']} - {pair['against']}"],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [100 * (pair["high"] - pair["difference"])],
                "arrayminus": [100 * (pair["difference"] - pair["low"])],
            },
            mode="markers",
            marker={"color": "#2a6fdb" if pair["shown"] else "gray", "size": 9},
            name=pair["claim"],
            showlegend=False,
        )
    figure.add_vline(x=0, line_dash="dot")
    figure.update_xaxes(title="points of top-1")
    figure.update_layout(height=140 + 34 * len(results["comparisons"]))
    return figure


def _of_test(results: dict[str, Any]) -> str:
    images = sum(data["images"] for data in results["test"])
    return f"{', '.join(data['name'] for data in results['test'])} ({images:,} images)"


def _short_key(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in ("objective", "optimizer", "train", "0"))


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
