"""`hf-mcsmoe report`."""

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hf_mcsmoe.cli.display import console


def draw(folder: Path) -> None:
    """Write the page of a result that was saved just now; where it cannot be, warn: the result is whole without it."""
    from hf_mcsmoe.report.page import write_report

    try:
        write_report([folder])
    except Exception as error:  # hours of work must not end in an error for want of a picture
        warnings.warn(f"{folder} is whole, but its page of pictures could not be written: {error!r}", stacklevel=2)


def report_command(
    folders: Annotated[list[str], typer.Argument(help="folders that `compress` or `distill` wrote", metavar="DIR...")],
    output: Annotated[
        Path | None, typer.Option(help="the page, if not report.html in the first folder", rich_help_panel="Output")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="file of statistics, for how alike any two experts are", rich_help_panel="Data")
    ] = None,
) -> None:
    """Write one page of pictures about results; several are compared by size and quality. Loads no weights."""
    from hf_mcsmoe.report.page import write_report

    console.print(f"[bold]{escape(str(write_report(folders, output, scores)))}[/] written")
