"""The floors of the house, its rooms and what they import; as a script it prints docs/structure.md."""

import ast
from pathlib import Path

import hf_mcsmoe

ROOT = Path(hf_mcsmoe.__file__).parent
# From the ground up; the rooms of a floor do not know each other. A room is a folder, or a file at the top.
FLOORS = [
    ["files", "processes", "progress"],
    ["modeling", "methods", "record"],
    ["tables", "variants"],
    ["layers", "data", "card"],
    ["calibration", "evaluation", "attached", "plan"],
    ["planning", "repair", "low_rank"],
    ["merge", "distillation", "quantization", "sparsity"],
    ["search", "presets"],
    ["forecast", "export"],
    ["options"],
    ["compress", "report"],
    ["demo", "streamed"],
    ["compare"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]
PAGE = Path(__file__).parents[1] / "docs" / "structure.md"
INTRODUCTION = """# How the package is built

Rooms on floors: a room (a folder of `hf_mcsmoe`, or a file at its top) imports from floors below and from itself
alone. `tests/test_structure.py` fails on any other import, and where this page is not what `python tests/house.py`
prints. `python examples/benchmarks/structure.py` measures the whole.

An arrow points to what a room needs; where that needs a third room in turn, the arrow to the third one is left out.
"""


def room(path: Path) -> str:
    """Return the room that a file of the package belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports absolutely, wherever in the file."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}


def rooms_below(path: Path) -> set[str]:
    """Return the rooms that a file imports from, its own left out."""
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("hf_mcsmoe.")}
    return parts - {room(path)}


def needs() -> dict[str, set[str]]:
    """Return for each room those that it imports from."""
    found: dict[str, set[str]] = {name: set() for name in FLOOR}
    for path in FILES:
        found[room(path)] |= rooms_below(path)
    return found


def purpose(name: str) -> str:
    """Return the first sentence of a room's docstring."""
    file = ROOT / name / "__init__.py" if (ROOT / name).is_dir() else ROOT / f"{name}.py"
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0]


def page() -> str:
    """Return the page: a picture of the floors with the arrows that do not follow from others, and a table."""
    direct = needs()
    reached: dict[str, set[str]] = {}
    for rooms in FLOORS:
        for name in rooms:
            reached[name] = direct[name].union(*(reached[other] for other in direct[name]))
    lines = [INTRODUCTION, "```mermaid", "flowchart TD"]
    for number, rooms in reversed(list(enumerate(FLOORS, start=1))):
        lines += [f'  subgraph floor{number}["floor {number}"]', *(f"    {name}" for name in rooms), "  end"]
    for name, others in direct.items():
        kept = {other for other in others if not any(other in reached[third] for third in others)}
        lines += [f"  {name} --> {other}" for other in sorted(kept)]
    lines += ["```", "", "| floor | room | what it is | imports from |", "|---:|---|---|---|"]
    for number, rooms in reversed(list(enumerate(FLOORS, start=1))):
        for name in rooms:
            lines.append(f"| {number} | `{name}` | {purpose(name)} | {', '.join(sorted(direct[name]))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
