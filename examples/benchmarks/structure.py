"""Measure how a Python package is built: rooms and the imports between them, sizes of functions, guessed attributes.

    python examples/benchmarks/structure.py [FOLDER]

A room is a folder of the package, or a file at its top. Floors are the rooms on the longest chain of imports. A
function's size is the lines of its body without the docstring.
"""

import argparse
import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "hf_mcsmoe"
# Rooms that know architectures, where attributes may be guessed; the former name of `layers` is among them.
MAY_GUESS = {"layers", "adapters", "modeling"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    """Print a markdown table, a row per measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=PACKAGE, help="the package")
    folder = parser.parse_args().folder.resolve()
    print("| measure | value |\n|---|---|")
    for name, value in measures(folder).items():
        print(f"| {name} | {value} |")


def measures(folder: Path) -> dict[str, str]:
    """Return the measures of a package by name.

    Raises:
        ValueError: the folder holds no Python.
    """
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))}
    if not trees:
        raise ValueError(f"{folder} holds no Python files.")
    imports = room_imports(folder, trees)
    circles = circular(imports)
    functions = [(path, node) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, Function)]
    sizes = sorted(size for _, node in functions if (size := body_lines(node)))
    widest, owner = max((parameters(node), f"{room(folder, path)}: {node.name}") for path, node in functions)
    guesses = [room(folder, path) for path, tree in trees.items() for _ in guessed(tree)]
    outside = [name for name in guesses if name not in MAY_GUESS]
    travelling = [path for path in trees if path.name.endswith("_mcsmoe.py")]
    return {
        "rooms": str(len(imports)),
        "floors (longest chain of imports)": str(max(map(len, chains(imports, circles).values()))),
        "arrows (imports between rooms)": str(sum(map(len, imports.values()))),
        "rooms that import each other in a circle": ", ".join(sorted(circles)) or "none",
        "files, lines": f"{len(trees)}, {sum(map(lines, trees)):,}",
        "longest file": "{1} ({0} lines)".format(*max((lines(path), str(path.relative_to(folder))) for path in trees)),
        "functions": f"{len(functions):,}",
        "lines of a body: median/mean/p90/max": spread(sizes),
        "with signature and docstring": spread(sorted(node.end_lineno - node.lineno + 1 for _, node in functions)),
        "longest parameter list": f"{widest} ({owner})",
        "getattr and hasattr": f"{len(guesses)}, {len(outside)} outside layers and modeling",
        "lines that travel with a checkpoint": f"{sum(map(lines, travelling)):,} in {len(travelling)} files",
    }


def room(folder: Path, path: Path) -> str:
    """Return the room that a file belongs to."""
    return path.relative_to(folder).parts[0].removesuffix(".py")


def room_imports(folder: Path, trees: dict[Path, ast.Module]) -> dict[str, set[str]]:
    """Return, per room, the other rooms that its files import from; the public front is no room."""
    rooms = {room(folder, path) for path in trees} - {"__init__"}
    found: dict[str, set[str]] = {name: set() for name in rooms}
    for path, tree in trees.items():
        own = room(folder, path)
        if own in rooms:
            found[own] |= {name for name in imported(tree, path, folder) if name in rooms and name != own}
    return found


def imported(tree: ast.Module, path: Path, folder: Path) -> Iterator[str]:
    """Yield the first name below the package of everything that a file imports from it, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(path.relative_to(folder.parent).parts[: -node.level]) if node.level else ""
            base = ".".join(part for part in (start, node.module) if part)
            modules = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            package, _, rest = module.partition(".")
            if package == folder.name and rest:
                yield rest.split(".")[0]


def circular(imports: dict[str, set[str]]) -> set[str]:
    """Return the rooms that are reached from themselves."""
    reached = {name: set(others) for name, others in imports.items()}
    for middle in imports:
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    return {name for name, others in reached.items() if name in others}


def chains(imports: dict[str, set[str]], circles: set[str]) -> dict[str, list[str]]:
    """Return, per room, the longest chain of rooms below it, itself first; rooms in circles have none below."""
    found: dict[str, list[str]] = {}

    def chain(name: str) -> list[str]:
        if name not in found:
            below = [] if name in circles else [chain(other) for other in sorted(imports[name])]
            found[name] = [name, *max(below, key=len, default=[])]
        return found[name]

    return {name: chain(name) for name in imports}


def body_lines(function: Function) -> int:
    """Return the lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def parameters(function: Function) -> int:
    """Return the number of parameters, `self` and `cls` left out."""
    given = function.args
    names = [item.arg for item in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [item.arg for item in (given.vararg, given.kwarg) if item is not None]
    return len([name for name in names if name not in ("self", "cls")])


def guessed(tree: ast.Module) -> Iterator[ast.Call]:
    """Yield the calls of `getattr` and `hasattr`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            yield node


def lines(path: Path) -> int:
    """Return the number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def spread(sizes: list[int]) -> str:
    """Return median, mean, ninetieth percentile and maximum of sorted values."""
    values = statistics.median(sizes), statistics.mean(sizes), sizes[int(0.9 * len(sizes))], sizes[-1]
    return "/".join(f"{value:.0f}" for value in values)


if __name__ == "__main__":
    main()
