"""Pages: single HTML files of one style, with plots, that need no network."""

from typing import Any

from clipdistill import __version__


def render_page(package: str, **values: Any) -> str:
    """The page that ``page.html`` of a package describes, within ``base.html``; needs jinja2 and plotly.

    Args:
        package: with the template.
        values: what the template names.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    templates = [jinja2.PackageLoader(name, "") for name in (package, __package__)]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(templates), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html").render(version=__version__, plotly=get_plotlyjs(), **values)


def plot_div(figure: Any) -> str:
    """A plotly figure as a part of a page."""
    figure.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        legend={"orientation": "h", "y": -0.22},
        modebar={"bgcolor": "rgba(0,0,0,0)"},
        paper_bgcolor="rgba(0,0,0,0)",
        showlegend=len(figure.data) > 1,
    )
    html = figure.to_html(include_plotlyjs=False, full_html=False, config={"displaylogo": False, "responsive": True})
    return str(html)
