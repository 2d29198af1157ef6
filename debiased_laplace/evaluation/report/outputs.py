"""Write the results: JSON, Markdown, reliability diagrams, and one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from debiased_laplace.evaluation import records
from debiased_laplace.evaluation.methods import MAP, TEMPERATURE
from debiased_laplace.evaluation.report import figures, pages, reliability, tables
from debiased_laplace.evaluation.report.drawing import Picture
from debiased_laplace.evaluation.report.statement import deciding_table, protocol, statement
from debiased_laplace.evaluation.report.verdicts import Summary, by_role

TEMPLATE = "report.html.jinja"


def write_outputs(folder: Path | str, summary: Summary, *, title: str = "", notice: str = "") -> dict[str, Path]:
    """Write ``results.json``, ``results.md``, ``reliability.png`` and ``report.html``, each atomically.

    Args:
        folder: Made if it is missing.
        summary: From :func:`~debiased_laplace.evaluation.report.summary.summarise`.
        title: Of the page.
        notice: A warning shown above everything, such as that this was a quick run.

    Returns:
        The paths, by name.
    """
    folder = Path(folder)
    title = title or f"Does uncertainty help? {summary['task']['name']}"
    paths = {name: folder / name for name in ("results.json", "results.md", "reliability.png", "report.html")}
    records.write_json(paths["results.json"], dict(summary) | {"statement": statement(summary)})
    records.write_whole(paths["results.md"], markdown(summary, title=title, notice=notice))
    diagrams = reliability.reliability_pictures(summary)
    records.write_whole(paths["reliability.png"], figures.reliability_png(summary, diagrams))
    records.write_whole(paths["report.html"], render(summary, diagrams, title=title, notice=notice))
    return paths


def markdown(summary: Summary, *, title: str, notice: str = "", level: int = 1) -> str:
    """The answer, the numbers that decide, and all tables as Markdown."""
    said, decides = statement(summary), deciding_table(summary)
    every = [*([decides] if decides else []), *tables.tables(summary)]
    notes = [summary["task"]["description"], *protocol(summary)]
    return pages.markdown(title, said, notes, every, notice=notice, level=level)


def render(summary: Summary, diagrams: Mapping[str, Picture], *, title: str, notice: str = "") -> str:
    """The page as text; everything is in it, nothing is loaded.

    Args:
        summary: What is shown.
        diagrams: From :func:`~debiased_laplace.evaluation.report.reliability.reliability_pictures`.
        title: Of the page.
        notice: A warning shown above everything.
    """
    candidate = by_role(summary, "candidate")
    first = {MAP, TEMPERATURE, candidate}
    folded = {"All scores on the test data": figures.risk_coverage, "Tuning and cost": figures.tuning}
    return pages.render(
        TEMPLATE,
        title=title,
        notice=notice,
        summary=summary,
        statement=statement(summary),
        decides=deciding_table(summary),
        reliability=[picture for name, picture in diagrams.items() if name in first],
        more_reliability=[picture for name, picture in diagrams.items() if name not in first],
        bins=reliability.bins_note(),
        pictures=figures.pictures(summary),
        topics=[
            (topic, group, folded[topic](summary) if topic in folded else None)
            for topic, group in tables.by_topic(summary).items()
        ],
        shown=figures.shown(summary),
        classes=summary["task"]["classes"],
        protocol=protocol(summary),
        coverage=None if candidate is None else summary["predictors"][candidate].get("coverage"),
        settings=pages.rows(summary["settings"]),
    )
