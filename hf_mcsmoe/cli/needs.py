"""Which statistics methods read, by the names that a user gives, and what collecting them costs."""

from hf_mcsmoe.methods.config import REGISTRIES
from hf_mcsmoe.methods.registry import Method, unknown
from hf_mcsmoe.methods.sample import SAMPLE, TOKENS
from hf_mcsmoe.methods.sparsity import SCORE
from hf_mcsmoe.methods.statistics import STATISTICS, with_tokens
from hf_mcsmoe.presets import PRESETS

# All methods that read sums: those of a merge or pruning, and the scores of weights inside experts.
ALL = (*REGISTRIES.values(), SCORE)


def usual() -> list[str]:
    """Return the statistics that take no product beyond those of the forward, and no sample."""
    found = STATISTICS.methods.values()
    return with_tokens(item.name for item in found if item.from_data and not item.products and item.name != SAMPLE)


def needs_of_names(text: str) -> list[str]:
    """Return the statistics that methods read, and the counts of tokens.

    Args:
        text: names with commas, of presets, of methods of any stage, or of statistics.

    Raises:
        ValueError: a name of none of these.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--methods {text!r} names nothing: give presets, methods or statistics with commas.")
    return with_tokens(["counts", *(read for name in names for read in _needs(name))])


def _needs(name: str) -> list[str]:
    stages = [registry for registry in ALL if name in registry.methods]
    if name not in (*PRESETS, *STATISTICS) and not stages:
        known = dict.fromkeys([*PRESETS, *(method for stage in ALL for method in stage), *STATISTICS])
        raise ValueError(unknown("method", name, list(known)))
    found = [read for registry in stages for read in registry.needs(name)]
    if name in PRESETS:
        found += PRESETS[name].options()["config"].needs
        found += SCORE.needs(PRESETS[name].sparsify) if PRESETS[name].sparsify else ()
    return [*found, *([name] if name in STATISTICS.methods else [])]


def costs(held: list[str]) -> dict[str, list[str]]:
    """Return the statistics that are not held, by what collecting them costs."""
    found: dict[str, list[str]] = {}
    for name, method in STATISTICS.methods.items():
        if name not in held:
            found.setdefault(_cost(method), []).append(name)
    return found


def _cost(statistic: Method) -> str:
    if not statistic.from_data:
        return "compares with --base-model"
    if statistic.gradients:
        return "a backward pass a batch"
    if statistic.name == SAMPLE:
        return f"a sample of {TOKENS:,} tokens a layer"
    return "runs each expert on its tokens" if statistic.products else "nothing beyond the forward"
