"""Options that commands share, and options made from the fields of dataclasses, where each is described once."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import Field, field, fields
from typing import Annotated, Any, get_type_hints

import torch
import typer
from transformers import PreTrainedModel

from hf_mcsmoe.methods.config import help_of, option_help

Model = Annotated[str, typer.Argument(help="folder or Hub id of the model", metavar="MODEL")]
Experts = Annotated[str, typer.Option(help=option_help("experts"))]
Skip = Annotated[list[str] | None, typer.Option(help=option_help("skip"))]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="write into a folder that is not empty")]
Tokenizer = Annotated[str | None, typer.Option(help="tokenizer, if not the model's own")]
DeviceMap = Annotated[str | None, typer.Option(help="where to load the model: cpu, cuda, auto ...")]


def described(default: Any, text: str, **settings: Any) -> Any:
    """Return a field that becomes an option of the command line, with its description and settings of Typer."""
    return field(default=default, metadata={"help": text, "typer": settings})


def options_of(config: type, into: str, names: list[str] | None = None) -> Callable[[Callable], Callable]:
    """Return a decorator that gives a command an option for each field of a dataclass.

    Default and description are the field's (`metadata["help"]`; `metadata["typer"]` holds further settings of the
    option). The command gets them together, as an instance of `config`, in its argument `into`.

    Args:
        names: the fields to offer, by default all; the others keep their defaults.
    """
    chosen = [item for item in fields(config) if names is None or item.name in names]
    added = [_parameter(item, get_type_hints(config)[item.name]) for item in chosen]

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            values = {item.name: given.pop(item.name) for item in chosen}
            command(**given, **{into: config(**values)})

        own = inspect.signature(command)
        parameters = [[item] if name != into else added for name, item in own.parameters.items()]
        # By name only, for then those without a default may stand behind others.
        named = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for part in parameters for item in part]
        run.__signature__ = own.replace(parameters=named)  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(item: Field, hint: Any) -> inspect.Parameter:
    # A method is given by name here, where the dataclass would take a callable as well.
    kind = hint if item.default is None else type(item.default)
    settings = {"help": help_of(item), **item.metadata.get("typer", {})}
    declared = settings.pop("names", ())
    annotation = Annotated[kind, typer.Option(*declared, **settings)]  # type: ignore[valid-type]
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=annotation)


def parse_experts(text: str) -> int | float:
    """Return the number of experts: "8" is a count per layer, "0.5" a share.

    Raises:
        ValueError: neither.
    """
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ValueError(f"--experts {text!r} is neither a whole number (8) nor a share (0.5).") from None


def itemsize(dtype: str, model: PreTrainedModel) -> int:
    """Return the bytes of a parameter in a dtype given by name; "auto" is the model's own.

    Raises:
        ValueError: torch has no such floating-point dtype.
    """
    if dtype == "auto":
        return model.dtype.itemsize
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"--dtype {dtype!r} is no floating-point dtype of torch (auto, float32, bfloat16, float16).")
    return found.itemsize
