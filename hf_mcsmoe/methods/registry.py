"""Named methods: a registry maps a method's name to its function, to its paper and to the statistics that it needs."""

import difflib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch


@dataclass(frozen=True)
class Method:
    """A function under its name.

    `paper` is an arXiv identifier or empty; `needs` the names of the statistics that the function reads; of a
    statistic, `gradients` says that it reads gradients of the loss, `products` that it multiplies what the forward did
    not, e.g. runs experts, `axes` which sizes its sum has, as letters ("ED"; None for any), `signed` whether a sum may
    be negative, `combine` what becomes of what two shards of the tokens say, and `from_data` that tokens tell it at
    all: what they do not is added to the statistics by a stage of its own.
    """

    name: str
    function: Callable[..., Any]
    paper: str = ""
    needs: tuple[str, ...] = ()
    gradients: bool = False
    axes: str | None = None
    signed: bool = False
    products: bool = False
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = operator.add
    from_data: bool = True


def adds(method: Method) -> bool:
    """Tell whether what two shards of the tokens say is added."""
    return method.combine is operator.add


@dataclass
class Registry:
    """The methods of one stage, e.g. `Registry("similarity")`."""

    stage: str
    methods: dict[str, Method] = field(default_factory=dict)

    def register(
        self,
        name: str,
        paper: str = "",
        needs: str | Sequence[str] = (),
        *,
        gradients: bool = False,
        axes: str | None = None,
        signed: bool | None = None,
        products: bool = False,
        combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = operator.add,
        from_data: bool = True,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that makes a function available as `name`; see `Method`.

        `needs` may be a single name. A sum may be negative unless its `axes` are told and `signed` is not.
        """

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            any_sign = axes is None if signed is None else signed
            extra = (any_sign, products or gradients, combine, from_data)
            self.methods[name] = Method(name, function, paper, _names(needs), gradients, axes, *extra)
            return function

        return decorate

    def __getitem__(self, method: str | Callable[..., Any]) -> Callable[..., Any]:
        """Return the function of a method given by name, or the callable itself.

        Raises:
            ValueError: no method has that name; the message names the nearest one and all there are.
        """
        return method if callable(method) else self.find(method).function

    def check(self, method: str | Callable[..., Any]) -> None:
        """Raise ValueError where no method has that name; any callable will do."""
        self[method]

    def __iter__(self) -> Iterator[str]:
        return iter(self.methods)

    def find(self, name: str) -> Method:
        """Return the method called `name`.

        Raises:
            ValueError: there is none; the message names the nearest one and all there are.
        """
        if not isinstance(name, str) or name not in self.methods:
            raise ValueError(unknown(f"{self.stage} method", name, list(self.methods)))
        return self.methods[name]

    def needs(self, method: str | Callable[..., Any]) -> tuple[str, ...]:
        """Return the statistics that a method reads; a callable of one's own names them in its attribute `needs`."""
        if not callable(method):
            return self.find(method).needs
        registered = next((known for known in self.methods.values() if known.function is method), None)
        return registered.needs if registered else _names(getattr(method, "needs", ()))


def _names(needs: str | Sequence[str]) -> tuple[str, ...]:
    return (needs,) if isinstance(needs, str) else tuple(needs)


def unknown(what: str, value: object, known: list[str]) -> str:
    """Return the message for a name that does not exist: the name, the nearest one, and all there are."""
    near = difflib.get_close_matches(str(value), known, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown {what} {value!r}.{meant} Known: {', '.join(map(repr, known))}."


def method_name(method: str | Callable[..., Any]) -> str:
    """Return the name to write into a plan for a method given by name or as a callable.

    A callable's is `module.qualname`, of its type where it has none: never the name of a method of a registry.
    """
    if isinstance(method, str):
        return method
    named = method if hasattr(method, "__qualname__") else type(method)
    return f"{named.__module__}.{named.__qualname__}"


def option_values(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass of options as JSON values: callables by name, tuples as lists."""
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    return {
        key: method_name(value) if callable(value) else list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
    }
