"""What a method sees of a layer: sums over the tokens, and tensors of experts and router, never a module."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from hf_mcsmoe.methods.experts import Experts
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.sample import SAMPLE, sampled
from hf_mcsmoe.methods.statistics import STATISTICS

ADVICE = (
    "collect it with collect_statistics(model, batches, needs=[{name!r}, ...]) or needs=MergeConfig(...).needs; on "
    "the command line `hf-mcsmoe calibrate MODEL --data ... --methods {name} --output FILE` adds it to a score file; "
    "a function of your own names what it reads in its attribute `needs`, as `function.needs = [{name!r}]`"
)


# What tokens do not tell.
REFERENCE = (
    "it compares with the checkpoint that the model was trained from, which --base-model names "
    "(compress(..., base_model=...) or add_reference)"
)


def advice(name: str) -> str:
    """Return how a sum that is not there is got."""
    known = STATISTICS.methods.get(name)
    return ADVICE.format(name=name) if known is None or known.from_data else REFERENCE


class Sums(dict[str, torch.Tensor]):
    """The sums of one layer by the name of the statistic.

    A sum that was not collected is a ValueError that names it and the way to add it.
    """

    def __missing__(self, name: str) -> torch.Tensor:
        held = ", ".join(self) or "none"
        raise ValueError(f"The statistic {name!r} was not collected (there are: {held}): {advice(name)}.")

    @property
    def counts(self) -> torch.Tensor:
        """Tokens that reached each expert, int64 [E]."""
        return self["counts"]

    @property
    def tokens(self) -> torch.Tensor:
        """Tokens seen, int64 []."""
        return self["tokens"]

    @property
    def frequency(self) -> torch.Tensor:
        """Share of the tokens that reached each expert, float64 [E]; zero where no token was seen."""
        return self.counts.double() / self.tokens.clamp(min=1)

    def check(self, names: Iterable[str]) -> None:
        """Raise the ValueError for the first of the sums that was not collected."""
        for name in names:
            if name not in self:
                self.__missing__(name)

    def __add__(self, other: "Sums") -> "Sums":
        """Return the sums over the tokens of both.

        Raises:
            ValueError: one of them lacks a sum that the other has.
        """
        if self.keys() != other.keys():
            raise ValueError(
                f"Only statistics of the same names can be added, not {', '.join(self)} and {', '.join(other)}: "
                "collect both with the same `needs`."
            )
        total = Sums(self)
        for name, value in other.items():
            total.add(name, value)
        return total

    def add(self, name: str, value: torch.Tensor) -> None:
        """Take in what the statistic `name` says of more tokens."""
        self[name] = STATISTICS.find(name).combine(self[name], value) if name in self else value


def _no_router() -> torch.Tensor | None:
    return None


@dataclass(frozen=True)
class LayerView:
    """All that a method may look at of a layer; it holds no module, and is given for the time of the call.

    `sums` by the statistic's name, `num_experts` E, `seed` for random methods, `capacity` the most experts that a
    group may hold, for groupings that know of it.
    """

    sums: Sums
    num_experts: int
    seed: int
    open_experts: Callable[[], Experts] = field(repr=False)
    open_router: Callable[[], torch.Tensor | None] = field(default=_no_router, repr=False)
    capacity: int | None = None

    @cached_property
    def experts(self) -> Experts:
        """The experts, read when touched."""
        return self.open_experts()

    @cached_property
    def router(self) -> torch.Tensor | None:
        """The router's weight [E, D], read when touched; None where it has no such matrix.

        A few routers read other inputs than the experts, and have rows of another length.
        """
        return self.open_router()

    @cached_property
    def sample(self) -> Routed:
        """Some tokens of the layer, where the statistic "sample" was collected; see `methods/sample.py`.

        Raises:
            ValueError: it was not, or no token counted.
        """
        return sampled(self.sums[SAMPLE], self.num_experts, lambda: self.experts)
