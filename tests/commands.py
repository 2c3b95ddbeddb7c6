"""Folders that the tests of the command line read, and the arguments of a short distillation."""

import json
from pathlib import Path
from typing import Any

from copa import rows
from families import build
from merged import example, tokenizer

TEXT = "\n\n".join(" ".join(f"w{50 + (7 * number + k) % 60}" for k in range(5)) for number in range(6))
TRAINING = ["--max-length", 8, "--batch-size", 2, "--learning-rate", "1e-2"]


def write_models(path: Path) -> Path:
    """Write tiny models, whole and merged, with a tokenizer, and text to train on."""
    for name in ("mixtral", "switch_transformers"):
        build(name).save_pretrained(path / name)
        example(name).merged.save_pretrained(path / f"merged_{name}")
        for saved in (name, f"merged_{name}"):
            tokenizer().save_pretrained(path / saved)
    (path / "text.txt").write_text(TEXT)
    pairs = [{"text": f"w{50 + n} w60", "answer": f"w{70 + n}"} for n in range(8)]
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (path / "copa.jsonl").write_text("\n".join(map(json.dumps, rows(4))))
    return path


def command(folder: Path, output: Path, name: str = "mixtral") -> list[Any]:
    """Return the arguments of a short run."""
    data = {"mixtral": ["--data", folder / "text.txt"], "switch_transformers": ["--data", folder / "pairs.jsonl"]}
    columns = ["--column", "text", "--target-column", "answer"] if name == "switch_transformers" else []
    given = [folder / f"merged_{name}", "--teacher", folder / name, *data[name], *columns, *TRAINING]
    return ["distill", *given, "--max-steps", 4, "--save-steps", 2, "--output", output]
