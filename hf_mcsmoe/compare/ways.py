"""Methods by name, and what each is called with at a level: presets, and the search for a size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args, get_type_hints

from hf_mcsmoe.compare.cells import EXPERTS, Level
from hf_mcsmoe.compare.sizes import bytes_with, experts_within
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.methods.budget import MEASURED
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.registry import unknown
from hf_mcsmoe.methods.sparsity import SCORE
from hf_mcsmoe.options import check_options, chosen_repair
from hf_mcsmoe.presets import PRESETS, check_untrained
from hf_mcsmoe.quantization.config import QuantizationConfig
from hf_mcsmoe.repair.methods import RepairConfig
from hf_mcsmoe.search.compress import check_size, source_bytes
from hf_mcsmoe.search.config import AUTO, SizeConfig
from hf_mcsmoe.search.curves import needs_of
from hf_mcsmoe.search.size import bytes_of

# The preset of this project, and the search for a size, among experts, bits and ranks, as `compress --size` does it.
OURS, OURS_BITS = "ours", "ours-bits"
ALL = "all"
# What may stand behind the name of a preset besides options of a merge, as `reap:repair=joint`.
REPAIR = "repair"


@dataclass(frozen=True)
class Way:
    """A method: a preset and what is changed of it, or keyword arguments of `compress` of one's own.

    `given` are those arguments, but for the number of experts; `bits` are stored beside every method.
    """

    name: str
    preset: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] | None = None
    bits: int | None = None

    @property
    def search(self) -> SizeConfig | None:
        """What a size is searched among; None where a size only decides on the number of experts."""
        return SizeConfig() if self.preset == OURS_BITS else None

    @property
    def has_seed(self) -> bool:
        """Whether the seed of random methods is given, and not that of the draw."""
        return self.given is not None or "seed" in self.changes

    def options(self, experts: int | float = 0.5) -> dict[str, Any]:
        """Return the keyword arguments of `compress` for a number of experts.

        Raises:
            ValueError: see `MergeConfig`.
        """
        if self.given is not None:
            options = {**self.given, "config": replace(self.given.get("config", MergeConfig()), experts=experts)}
        else:
            changes = dict(self.changes)
            repair = changes.pop(REPAIR, None)
            options = PRESETS[OURS if self.preset == OURS_BITS else self.preset].options(experts, **changes)
            options |= {} if repair is None else {"repair": chosen_repair(RepairConfig(method=repair))}
        quantization = options.get("quantization")
        if self.bits and quantization is None:
            quantization = QuantizationConfig(bits=self.bits, skip=options["config"].skip)
        return {"repair": None, "low_rank": None, **options, "quantization": quantization}

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that the method reads."""
        if self.search:
            return needs_of(MergeConfig(), self.search)
        options = self.options()
        sparsity = options.get("sparsity")
        config = options["config"]
        tries = config.budget == MEASURED
        tried = needs_of(MergeConfig(), SizeConfig(bits=(), ranks=(), reduce=AUTO)) if tries else ()
        return (*config.needs, *tried, *(SCORE.needs(sparsity.score) if sparsity else ()))

    def told(self) -> dict[str, Any]:
        """Return all that the method is made of, as JSON values."""
        options = self.options()
        parts = {name: value.to_dict() for name, value in options.items() if value is not None}
        parts["config"].pop("experts")
        return parts | ({"search": self.search.to_dict()} if self.search else {})


@dataclass(frozen=True)
class Task:
    """A method at a level, checked: what `compress` is called with, and the bytes that a size stands for."""

    way: Way
    level: Level
    options: Mapping[str, Any]
    asked: int | None = None

    @property
    def reads(self) -> bool:
        """Whether calibration text is read beside the statistics."""
        stages = ("repair", "low_rank", "quantization", "sparsity", "size")
        return self.needs_curves or any(self.options.get(name) for name in stages)

    @property
    def needs_curves(self) -> bool:
        """Whether it is measured what choices cost."""
        return bool(self.options.get("size")) or self.options["config"].budget == MEASURED


def task_of(layers: Layers, way: Way, level: Level) -> Task:
    """Return a method at a level, checked before any forward and without weights.

    Raises:
        ValueError: it cannot be done to this model; see `check_options`, `check_size` and `experts_within`.
    """
    if level.kind == EXPERTS and way.search is None:
        return _checked(layers, Task(way, level, way.options(level.experts)))
    if level.kind == EXPERTS:
        asked = bytes_with(layers, way.options(), level.experts)
    else:
        asked = bytes_of(level.value, source_bytes(layers))
    if way.search is None:
        if way.options().get("sparsity"):
            raise ValueError(f"{way.name} leaves out weights, which saves no bytes: compare it at shares (experts).")
        experts = experts_within(layers, way.options(), asked, str(level.value))
        return _checked(layers, Task(way, level, way.options(experts), asked))
    size = replace(way.search, size=f"{asked}B")
    check_size(layers, MergeConfig(), size)
    return Task(way, level, {"config": MergeConfig(), "repair": None, "size": size}, asked)


def needed(tasks: Sequence[Task]) -> list[str]:
    """Return the statistics that all of the methods read together."""
    return list(dict.fromkeys(name for task in tasks for name in task.way.needs))


def _checked(layers: Layers, task: Task) -> Task:
    stages: dict[str, Any] = {
        name: task.options.get(name) for name in ("repair", "low_rank", "quantization", "sparsity")
    }
    check_options(layers, task.options["config"], **stages)
    return task


def ways_of(methods: Sequence[str] | Mapping[str, Mapping[str, Any]], bits: int | None = None) -> list[Way]:
    """Return methods by their names, or ones of one's own.

    Args:
        methods: names of presets, each perhaps with changes (`reap:budget=uniform:repair=joint`), or "all"; or by
            names of one's own the keyword arguments of `compress`, of whose `config` the experts do not count.
        bits: stored beside every method.

    Raises:
        ValueError: an unknown name or option, or a name that is given twice.
    """
    if isinstance(methods, Mapping):
        ways = [Way(name, given=given, bits=bits) for name, given in methods.items()]
    else:
        names = [part for name in methods for part in (PRESETS if name == ALL else [name])]
        ways = [_way(name, bits) for name in dict.fromkeys(names)]
    if not ways:
        raise ValueError(f"There are no methods to compare: name some of {', '.join(PRESETS)}, or {ALL}.")
    for way in ways:
        way.options()  # which refuses what no method is
    return ways


def _way(name: str, bits: int | None) -> Way:
    preset, *changes = name.split(":")
    if preset == OURS_BITS and changes:
        raise ValueError(f"{name}: {OURS_BITS} is a search, to which no option is given; change {OURS} in its place.")
    check_untrained(preset)
    if preset not in (*PRESETS, OURS_BITS):
        raise ValueError(unknown("method", preset, [*PRESETS, OURS_BITS, ALL]))
    return Way(name, preset, dict(_change(name, change) for change in changes), bits=bits)


def _change(name: str, text: str) -> tuple[str, Any]:
    """Return an option of a merge, or the repair, that `option=value` says."""
    option, equals, value = text.partition("=")
    hints = get_type_hints(MergeConfig) | {REPAIR: str}
    if not equals or option in ("experts", "skip", "file_name") or option not in hints:
        known = [known for known in hints if known not in ("experts", "skip", "file_name")]
        raise ValueError(f"{name}: {unknown('option', option, known)} Write it as option=value.")
    is_number = int in (hints[option], *get_args(hints[option]))
    if is_number and not value.isdecimal():
        raise ValueError(f"{name}: {option}={value!r} must be a whole number.")
    return option, int(value) if is_number else value
