"""The page of methods, from the registries; as a script it prints docs/methods.md."""

import re
from inspect import getdoc
from pathlib import Path

from hf_mcsmoe.methods.registry import Method, Registry
from hf_mcsmoe.methods.saliency import SALIENCY
from hf_mcsmoe.methods.similarity import SIMILARITY
from hf_mcsmoe.methods.statistics import STATISTICS
from hf_mcsmoe.quantization.expert_bits import IMPORTANCE

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
INTRODUCTION = """# What experts are compared and judged by

Which experts belong together (`--similarity`), which matter (`--saliency`), and what is summed over the calibration
data for that. The page is what the functions say of themselves (`python tests/methods_page.py > docs/methods.md`);
`hf-mcsmoe methods` lists the other stages as well, and the presets.

What a method reads are sums of a pass over the data. `sample` are up to 1,024 tokens of a layer, on which all experts
are run when a plan is made. Who reads nothing looks at the weights of the experts or the router. Sums with products
run experts, or a backward pass, beside the forward; `python examples/benchmarks/statistics_pass.py --each` measures
what each costs. One is told by no data, but by the checkpoint that the model was trained from (`--base-model`).
"""
TABLES: list[tuple[str, str, Registry]] = [
    ("Similarity", "A matrix [E, E], larger for experts that are more alike.", SIMILARITY),
    ("Saliency", "A number for each expert, larger where it matters more.", SALIENCY),
    (
        "Importance",
        "Which stored experts have more bits (`QuantizationConfig(low_bits=..., importance=...)`).",
        IMPORTANCE,
    ),
]


def text_of(method: Method) -> str:
    """Return what a method's function says of itself in its first sentence."""
    first = " ".join((getdoc(method.function) or "").partition("\n\n")[0].split())
    plain = re.sub(r"^Return |,? (float64|int64|float32) \[[^]]*\]( on the CPU| in \[0, 1\])?", "", first)
    return plain.rstrip(".").replace("|", "\\|")


def page() -> str:
    """Return the page: a table for each stage, and one of the sums."""
    lines = [INTRODUCTION]
    for title, told, registry in TABLES:
        lines += [f"## {title}", "", told, "", "| name | what it is | paper | reads |", "|---|---|---|---|"]
        for method in registry.methods.values():
            paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else ""
            lines.append(f"| `{method.name}` | {text_of(method)} | {paper} | {', '.join(method.needs)} |")
        lines.append("")
    lines += ["## Sums", "", "| name | what it is | |", "|---|---|---|"]
    for method in STATISTICS.methods.values():
        kinds = {"gradients": method.gradients, "products": method.products, "--base-model": not method.from_data}
        lines.append(
            f"| `{method.name}` | {text_of(method)} | {', '.join(kind for kind, is_so in kinds.items() if is_so)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
