"""Recipes: the options of a run as a YAML file, which `--config` reads and a result has beside its weights."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml

from hf_mcsmoe.methods.options import described, fits
from hf_mcsmoe.methods.registry import unknown
from hf_mcsmoe.record import is_repo_id, public_name

FORMAT, FORMAT_VERSION = "mcsmoe-recipe", 1
HEAD = ("format", "format_version", "command", "hf_mcsmoe")
# Where results go, what is to become of what lies there, and the memory of a machine are nobody else's business.
UNTOLD = ("output", "overwrite", "push_to_hub", "resume", "json", "stream", "memory", "restart")
# What is named by a path or an id.
NAMES = (
    "model",
    "student",
    "teacher",
    "models",
    "base_model",
    "tokenizer",
    "data",
    "check_data",
    "eval",
    "data_dir",
    "file",
    "scores",
)
# What options were called before, and what they are called now.
RENAMED = {"statistics": "scores"}
# Counts and shares, which the command line takes as text.
NUMBERS = ("experts", "size", "sizes", "bits")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node."""
        keys = [key.value for key, _ in node.value]
        if twice := [key for place, key in enumerate(keys) if key in keys[:place]]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path, command: str, hints: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a recipe gives a command, by their keys.

    Args:
        hints: the type of each option of the command, by its key.

    Raises:
        ValueError: there is no such file, or it is damaged, of another command or a later version, or holds a key that
            the command has not, or a value of another type.
    """
    content = _parsed(path)
    _check_head(path, content, command)
    options = {key: value for key, value in content.items() if key not in HEAD}
    for name in ("data", "check_data"):
        if isinstance(options.get(name), str) and not fits("", hints.get(name, str)):
            options[name] = [options[name]]  # mostly there is one
    for key, value in options.items():
        if key in RENAMED:
            raise ValueError(f"{path}: {key} is called {RENAMED[key]} now: write that.")
        if key not in hints:
            raise ValueError(f"{path}: {unknown(f'option of {command}', key, [*hints, *HEAD])}")
        if not (fits(value, hints[key]) or (key in NUMBERS and fits(value, float))):
            raise ValueError(f"{path}: {key} is {value!r}, and must be {described(hints[key])}.")
    return {key: str(value) if key in NUMBERS else value for key, value in options.items() if value is not None}


def _parsed(path: Path) -> dict[Any, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"--config {path} is no text in UTF-8, and so no recipe.") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"--config {path} is no YAML: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} is no recipe: it must hold a line like 'experts: 0.5' for each option.")
    return content


def _check_head(path: Path, content: Mapping[Any, Any], command: str) -> None:
    """Raise ValueError where what a recipe says of itself does not fit; it need not say anything."""
    if (kind := content.get("format", FORMAT)) != FORMAT:
        raise ValueError(f"{path} is no recipe: its format is {kind!r}, and must be {FORMAT!r}.")
    number = content.get("format_version", FORMAT_VERSION)
    if not fits(number, int) or not 1 <= number <= FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {number!r}, and this version reads {FORMAT_VERSION}: update hf_mcsmoe."
        )
    if (other := content.get("command", command)) != command:
        raise ValueError(f"{path} is a recipe for hf-mcsmoe {other}, and this is hf-mcsmoe {command}.")


def recipe_text(command: str, options: Mapping[str, Any]) -> str:
    """Return the recipe of a run: all of its options but where the result goes; of a path, only the last part."""
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "command": command, "hf_mcsmoe": version("hf_mcsmoe")}
    told = {key: _told(key, value) for key, value in options.items() if key not in UNTOLD and value not in (None, [])}
    text = yaml.safe_dump(head | told, sort_keys=False, allow_unicode=True)
    return f"# The same again: hf-mcsmoe {command} --config THIS_FILE --output DIR\n{text}"


def _told(key: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_told(key, item) for item in value]
    if key in NUMBERS:
        return _number(value)
    return _public(str(value)) if key in NAMES else value


def _number(text: str) -> int | float | str:
    """Return a count or a share; text where it is neither (20GB)."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _public(name: str) -> str:
    """Return a Hub id as it is, with what stands behind a colon, and of a path the last part."""
    return name if is_repo_id(name.partition(":")[0]) else public_name(name)


def with_recipe(name: str, command: Callable) -> Callable:
    """Return a command that also takes `--config`; its argument `recipe`, if it has one, gets its options by key."""
    own = inspect.signature(command)
    parameters = [item for item in own.parameters.values() if item.name != "recipe"]
    keys = {item.name: _key(item) for item in parameters}
    hints = {keys[item.name]: get_args(item.annotation)[0] for item in parameters}

    def load(context: typer.Context, value: Path | None) -> Path | None:
        if value is not None:
            given = read_recipe(value, name, hints)
            before = context.default_map or {}  # of a preset on the command line, which comes first
            context.default_map = {item: given[key] for item, key in keys.items() if key in given}
            _check_ranges(value, context, keys)
            context.default_map = {**context.default_map, **before}
        return value

    @functools.wraps(command)
    def run(config: Path | None = None, **given: Any) -> None:
        options = {keys[item]: value for item, value in given.items()}
        command(**given, **({"recipe": options} if "recipe" in own.parameters else {}))

    option = typer.Option("--config", metavar="FILE", is_eager=True, callback=load, help=CONFIG_HELP)
    kind = inspect.Parameter.KEYWORD_ONLY
    added = inspect.Parameter("config", kind, default=None, annotation=Annotated[Path | None, option])
    run.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*(item.replace(kind=kind) for item in parameters), added]
    )
    return run


CONFIG_HELP = "read options from a recipe (YAML); those given here come first, and what it names need not be given"


def _key(parameter: inspect.Parameter) -> str:
    """Return what a recipe calls an option: its name on the command line, with underscores."""
    info = get_args(parameter.annotation)[1]
    declared = [info.default, *(info.param_decls or ())]  # Typer puts the first name where a default may stand
    long = next((text for text in declared if isinstance(text, str) and text.startswith("--")), parameter.name)
    return long.lstrip("-").replace("-", "_")


def _check_ranges(path: Path, context: typer.Context, keys: Mapping[str, str]) -> None:
    """Raise ValueError where a value of a recipe is out of the range of its option."""
    for parameter in context.command.params:
        if parameter.name in (context.default_map or {}):
            value = context.default_map[parameter.name]  # type: ignore[index]
            try:
                parameter.process_value(context, value)
            except typer.BadParameter as error:
                told = error.message or "name at least one"
                raise ValueError(f"{path}: {keys[str(parameter.name)]} is {value!r}: {told}") from None
