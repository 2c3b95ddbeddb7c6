"""`hf-mcsmoe methods`."""

from collections.abc import Iterator
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from hf_mcsmoe.cli.display import console
from hf_mcsmoe.cli.options import check_file
from hf_mcsmoe.files import write_json
from hf_mcsmoe.methods.config import REGISTRIES
from hf_mcsmoe.methods.registry import Method, Registry
from hf_mcsmoe.methods.sample import SAMPLE
from hf_mcsmoe.methods.sparsity import SCORE
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.presets import PRESETS, TRAINED
from hf_mcsmoe.quantization.nearest import ROUNDING
from hf_mcsmoe.repair.methods import REPAIR

STAGES: dict[str, Registry] = {**REGISTRIES, "repair": REPAIR, "rounding": ROUNDING, "score of weights": SCORE}


def methods_command(
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="write the list to this file as well", rich_help_panel="Output"),
    ] = None,
) -> None:
    """List the presets and, stage by stage, the methods: papers, what each reads, and what that costs."""
    target = None if json_file is None else check_file(json_file, "--json")
    found = {"presets": list(_presets()), **{stage: list(_methods(known)) for stage, known in STAGES.items()}}
    for stage, rows in found.items():
        console.print(f"[bold]{stage}[/]")
        for row in rows:
            _show(row)
        console.print()
    if target is not None:
        write_json(target, found)


def _presets() -> Iterator[dict[str, Any]]:
    for preset in PRESETS.values():
        yield {
            "name": preset.name,
            "paper": preset.paper,
            "text": preset.text,
            "differs": preset.differs,
            "options": preset.command_line(),
        }
    for trained in TRAINED.values():
        yield {
            "name": trained.name,
            "paper": trained.paper,
            "text": trained.text,
            "differs": f"{trained.differs}; a preset of `hf-mcsmoe distill`",
            "options": dict(trained.options),
        }


def _methods(registry: Registry) -> Iterator[dict[str, Any]]:
    for method in registry.methods.values():
        yield {
            "name": method.name,
            "paper": method.paper,
            "text": (getdoc(method.function) or "").partition("\n")[0],
            "needs": list(method.needs),
            "cost": cost_of(method),
        }


def cost_of(method: Method) -> str:
    """Return what it costs to collect what a method reads, the most of its parts.

    "gradients" (a backward pass), "products" (experts run once more on their own tokens), "reference" (another
    checkpoint's routers, and no pass), "sample" (a forward, then experts run on some tokens of a layer), "forward", or
    "nothing".
    """
    read = [STATISTICS.methods[name] for name in method.needs if name in STATISTICS.methods]
    kinds = {
        "gradients": any(statistic.gradients for statistic in read),
        "products": any(statistic.products for statistic in read),
        "reference": any(not statistic.from_data for statistic in read),
        "sample": SAMPLE in method.needs,
        "forward": bool(read),
    }
    return next((kind for kind, holds in kinds.items() if holds), "nothing")


def _show(row: dict[str, Any]) -> None:
    paper = f" [arXiv {row['paper']}]" if row["paper"] else ""
    console.print(f"  [cyan]{row['name']}[/]{escape(paper)}  {escape(row['text'])}", highlight=False)
    if row.get("differs"):
        console.print(f"      differs: {escape(row['differs'])}", highlight=False)
    told = row.get("options") or {"needs": ", ".join(row.get("needs", ())), "cost": row.get("cost", "")}
    if row.get("needs") or row.get("options"):
        console.print("      " + escape(", ".join(f"{key} {value}" for key, value in told.items())), highlight=False)
