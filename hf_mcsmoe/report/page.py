"""The page itself: pictures of one or several results in one HTML file that needs neither network nor script."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.files import write_text
from hf_mcsmoe.report.pictures import Picture, pictures
from hf_mcsmoe.report.quality import compared, stages, summary
from hf_mcsmoe.report.result import Result, read_result
from hf_mcsmoe.report.storage import expected, ladder, storage

REPORT_FILE = "report.html"
# Of more results at once nobody could tell the points apart.
MOST_RESULTS = 40

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(
    folders: Sequence[str | Path], output: str | Path | None = None, statistics: str | Path | None = None
) -> Path:
    """Write one page about the results in `folders`; returns its path.

    Args:
        output: the file to write, by default `report.html` in the first folder.
        statistics: a file of routing statistics, for the similarity of any two experts.

    Raises:
        ValueError: see `read_result` and `RoutingStatistics.load`; no folders, one named twice or too many; statistics
            of none of the results.
        OSError: the file cannot be written.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    if not 1 <= len(paths) <= MOST_RESULTS:
        raise ValueError(f"A report is about 1 to {MOST_RESULTS} results, not {len(paths)}.")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"A folder is named twice among {', '.join(map(str, paths))}: name each once.")
    file = paths[0] / REPORT_FILE if output is None else Path(output).expanduser()
    if file.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{file} is no name of a page: let it end in .html.")
    sums = None if statistics is None else RoutingStatistics.load(statistics)
    results = [read_result(path) for path in paths]
    if sums is not None and all(result.fingerprint != sums.fingerprint for result in results):
        raise ValueError(f"{statistics} was taken from another model than the original of {paths[0]}.")
    write_text(file, render(results, sums))
    return file


def _pictures(result: Result, statistics: RoutingStatistics | None) -> list[Picture]:
    """Return the pictures of one result."""
    sizes, *others = pictures(result, statistics)
    predictions = [picture for picture in (expected(result), ladder(result)) if picture]
    return [sizes, storage(result), *predictions, *others, stages(result)]


def render(results: Sequence[Result], statistics: RoutingStatistics | None = None) -> str:
    """Return the page as HTML."""
    return TEMPLATES.get_template("page.html").render(
        title=results[0].name if len(results) == 1 else f"{len(results)} results",
        comparison=compared(results) if len(results) > 1 else None,
        sections=[(result, summary(result), _pictures(result, statistics)) for result in results],
        version=version("hf_mcsmoe"),
    )
