"""One check of values by their annotation, for options and for the arguments of public functions."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

WORDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text", NoneType: "None"}


def check_fields(config: Any, of: type | None = None) -> None:
    """Raise ValueError where a field of a dataclass of options holds another kind of value than it is annotated with.

    Args:
        of: the dataclass whose fields are meant, by default that of `config`.
    """
    kind = of or type(config)
    for item in fields(kind):
        check_value(item.name, vars(config)[item.name], _hints(kind)[item.name])


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError where an option is not what `hint` says; a float must be finite, and a bool is no number."""
    kinds = _alternatives(hint)
    if not any(_is(value, kind) for kind in kinds):
        raise ValueError(f"{name}={value!r} must be {' or '.join(dict.fromkeys(map(_words, kinds)))}.")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = get_origin(hint) is not None and get_origin(hint) not in (tuple, list) and not _is_callable(hint)
    return get_args(hint) if is_union else (hint,)


def _is_callable(hint: Any) -> bool:
    return hint is Callable or get_origin(hint) is get_origin(Callable[..., Any])


def _is(value: Any, kind: Any) -> bool:
    if _is_callable(kind):
        return callable(value)
    if get_origin(kind) in (tuple, list):
        return type(value) in (tuple, list) and all(_is(entry, get_args(kind)[0]) for entry in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is int if kind is int else isinstance(value, kind)


def _words(kind: Any) -> str:
    if _is_callable(kind):
        return "a function"
    if get_origin(kind) in (tuple, list):
        return f"a list, each entry {_words(get_args(kind)[0])}"
    return WORDS[kind]


def check_given(**values: tuple[Any, type | tuple[type, ...]]) -> None:
    """Raise TypeError where an argument of a public function is of the wrong kind.

    Args:
        values: by the argument's name, what was given and what it must be; None as a kind allows None.
    """
    for name, (value, kinds) in values.items():
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, allowed):
            words = " or ".join("None" if kind is NoneType else kind.__name__ for kind in allowed)
            raise TypeError(f"{name} must be {words}, not {_shown(value)}.")


def _shown(value: Any) -> str:
    """Return a value as an error shows it: short ones as they are, others by their kind."""
    plain = value is None or isinstance(value, str | int | float) or (isinstance(value, Mapping) and len(value) < 5)
    return f"{value!r:.100}" if plain else type(value).__name__
