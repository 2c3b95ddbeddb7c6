"""`--preset`: the options of a published combination, which those beside it override."""

from typing import Annotated

import typer

from hf_mcsmoe.methods.registry import unknown
from hf_mcsmoe.presets import PRESETS, TRAINED

# The options of a merge beside how many experts stay, which a preset may say.
MERGE = [
    "budget",
    "min_experts",
    "saliency",
    "similarity",
    "grouping",
    "capacity",
    "weighting",
    "alignment",
    "reference",
    "merging",
    "selection",
    "router",
    "pruned_router",
]


def _load(context: typer.Context, name: str | None) -> str | None:
    """Let the options of a preset stand where the command line, or a recipe that names the preset, gives none."""
    if name is not None:
        given, source = dict(context.default_map or {}), context.get_parameter_source("preset")
        preset = PRESETS[name].command_line()
        # What is typed comes before what a recipe says, and a recipe's options before those of its preset.
        context.default_map = given | preset if source and source.name == "COMMANDLINE" else preset | given
    return name


PresetName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        is_eager=True,
        callback=_load,
        help=f"a published combination, with --experts; options beside it override its own: {', '.join(PRESETS)}",
        rich_help_panel="Merge",
    ),
]


def load_trained(context: typer.Context, name: str | None) -> str | None:
    """Do the same of the presets of `hf-mcsmoe distill`.

    Raises:
        ValueError: there is no such preset.
    """
    if name is None:
        return None
    if name not in TRAINED:
        told = f" {name} is one of `hf-mcsmoe compress`." if name in PRESETS else ""
        raise ValueError(unknown("preset", name, list(TRAINED)) + told)
    given, source = dict(context.default_map or {}), context.get_parameter_source("preset")
    preset = dict(TRAINED[name].options)
    context.default_map = given | preset if source and source.name == "COMMANDLINE" else preset | given
    return name


def check_preset(name: str | None, *, is_by_hand: bool) -> None:
    """Raise ValueError where a preset is given, and not how many experts to keep."""
    if name is not None and not is_by_hand:
        raise ValueError(
            f"--preset {name} says how experts become fewer, and not how many: give --experts as well (0.5), in place "
            "of --size."
        )
