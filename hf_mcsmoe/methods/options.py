"""What classes of options share: they become plain values, a file in a folder, and themselves again."""

import json
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from hf_mcsmoe.files import write_json
from hf_mcsmoe.methods.registry import option_values, unknown


class Options:
    """Gives a dataclass of options `to_dict`, `from_dict`, `save_pretrained` and `from_pretrained`."""

    file_name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values; a callable is written as its name."""
        return option_values(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the options that `to_dict` gave; those that are not named have their defaults.

        Raises:
            TypeError: no mapping, or a value of another type.
            ValueError: a name that no option has, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__} is made from a dictionary of options, not {type(values).__name__}.")
        hints = {item.name: get_type_hints(cls)[item.name] for item in fields(cls)}  # type: ignore[arg-type]
        for name, value in values.items():
            if name not in hints:
                raise ValueError(unknown(f"option of {cls.__name__}", name, list(hints)))
            if not fits(value, hints[name]):
                raise TypeError(f"{cls.__name__}: {name}={value!r} must be {described(hints[name])}.")
        return cls(**{name: _as_declared(value, hints[name]) for name, value in values.items()})

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the options to a file of their own in `folder`, which is made where it is not there.

        Raises:
            ValueError: a method was given as a callable, which no file can hold.
        """
        for item in fields(self):  # type: ignore[arg-type]
            if callable(vars(self)[item.name]):
                raise ValueError(
                    f"{type(self).__name__} cannot be saved: {item.name} is a callable ({self.to_dict()[item.name]}); "
                    "register it as a method, and give it by its name."
                )
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / self.file_name, self.to_dict())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> Self:
        """Return the options that `save_pretrained` wrote into `folder`.

        Raises:
            ValueError: there are none, or the file is damaged; see `from_dict` as well.
        """
        file = Path(folder) / cls.file_name
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError:
            wanted = f"{cls.file_name}, which {cls.__name__}.save_pretrained writes"
            raise ValueError(f"{folder} holds no {wanted}.") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it, and save the options again.") from None
        return cls.from_dict(values)


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value read from a file is of an option's type; a whole number is a number, true is none."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if origin in (tuple, list):
        return isinstance(value, list | tuple) and all(fits(item, get_args(hint)[0]) for item in value)
    if hint is Path:
        return isinstance(value, str | Path)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (Callable, Any) or origin is not None:
        return hint is not Callable or callable(value)
    return value is None if hint is type(None) else isinstance(value, hint)


def described(hint: Any) -> str:
    """Return a type in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(described, get_args(hint))))
    if get_origin(hint) in (tuple, list):
        return f"a list, each {described(get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(hint, "a callable" if hint is Callable else "text")


def _as_declared(value: Any, hint: Any) -> Any:
    """Return a list as the tuple that an option has."""
    return tuple(value) if isinstance(value, list) and get_origin(hint) is tuple else value
