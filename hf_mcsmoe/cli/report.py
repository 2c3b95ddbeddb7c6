"""`hf-mcsmoe report`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hf_mcsmoe.cli.display import console


def report_command(
    folders: Annotated[list[str], typer.Argument(help="folders that `compress` or `distill` wrote", metavar="DIR...")],
    output: Annotated[Path | None, typer.Option(help="the page, if not report.html in the first folder")] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="file of statistics, for how alike any two experts are")
    ] = None,
) -> None:
    """Write one page of pictures about results; several are compared by size and quality. Loads no weights."""
    from hf_mcsmoe.report.page import write_report

    console.print(f"[bold]{escape(str(write_report(folders, output, statistics)))}[/] written")
