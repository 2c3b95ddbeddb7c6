"""`hf-mcsmoe demo`."""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hf_mcsmoe.cli.display import console
from hf_mcsmoe.cli.examples import write_recipes
from hf_mcsmoe.cli.options import Experts, Overwrite, claimed, parse_experts

NEXT = (
    "Next: hf-mcsmoe demo --files demo copies the model and its text, and\n"
    "hf-mcsmoe compress --help ends with a command to try on them."
)


def demo_command(
    experts: Experts = "0.5",
    output: Annotated[
        Path | None, typer.Option(help="keep the merged model in this folder", rich_help_panel="Output")
    ] = None,
    overwrite: Overwrite = False,
    files: Annotated[
        Path | None,
        typer.Option(
            help="only copy the model and its text into this folder, to try commands on", rich_help_panel="Output"
        ),
    ] = None,
) -> None:
    """Merge the small trained Switch Transformer that comes with the package, in nine ways, and compare them."""
    from hf_mcsmoe.demo import ASSETS, compare

    if files is not None and output is not None:
        raise ValueError("--files only copies the model, and --output keeps a merged one: give one of them.")
    if files is not None:
        folder = claimed(files, overwrite)
        shutil.copytree(ASSETS, folder, dirs_exist_ok=True)
        write_recipes(folder, files, parse_experts(experts))
        console.print(f"[bold]{escape(str(files))}[/] holds model, calibration.jsonl and evaluation.jsonl")
        return

    if output is not None:
        output = claimed(output, overwrite)
    console.print(compare(parse_experts(experts), output))
    console.print(NEXT, highlight=False)
