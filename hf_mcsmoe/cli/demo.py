"""`hf-mcsmoe demo`."""

from pathlib import Path
from typing import Annotated

import typer

from hf_mcsmoe.cli.display import console
from hf_mcsmoe.cli.options import Experts, Overwrite, claimed, parse_experts


def demo_command(
    experts: Experts = "0.5",
    output: Annotated[Path | None, typer.Option(help="keep the merged model in this folder")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge the small trained Switch Transformer that comes with the package, in four ways, and compare them."""
    from hf_mcsmoe.demo import compare

    if output is not None:
        output = claimed(output, overwrite)
    console.print(compare(parse_experts(experts), output))
