"""An example for each command, on the model and the text that come with the package; help shows them as they are."""

from pathlib import Path

import yaml

FILES = "hf-mcsmoe demo --files demo"
# Each a line that fits a terminal of 80 columns: one that is broken in two cannot be pasted.
EXAMPLES = {
    "inspect": "hf-mcsmoe inspect demo/model --experts 0.5",
    "plan": "hf-mcsmoe plan demo/model",
    "calibrate": "hf-mcsmoe calibrate --config demo/calibrate.yaml --output scores.safetensors",
    "compare": "hf-mcsmoe compare demo/model --config demo/compare.yaml --output demo/table",
    "compress": "hf-mcsmoe compress demo/model --config demo/compress.yaml --output demo/small",
    "distill": "hf-mcsmoe distill demo/small --config demo/distill.yaml --output demo/tuned",
    "export": "hf-mcsmoe export demo/small --expand --output demo/full",
    "evaluate": "hf-mcsmoe evaluate demo/model demo/small --config demo/evaluate.yaml",
    "report": "hf-mcsmoe report demo/small",
    "methods": "hf-mcsmoe methods --json methods.json",
    "demo": FILES,
}
# Commands whose examples need no files.
ALONE = ("demo", "methods")
# What an example needs besides those files.
AFTER = {"distill": "compress", "export": "compress", "evaluate": "compress", "report": "compress"}


def epilog(command: str) -> str:
    """Return the example of a command as the end of its help."""
    first = f", after that of {AFTER[command]}" if command in AFTER else ""
    lines = [EXAMPLES[command]] if command in ALONE else [FILES, EXAMPLES[command]]
    return "\n".join([f"Example{first}:", *lines])


def write_recipes(folder: Path, named: Path, experts: int | float) -> None:
    """Write the recipes of the examples, with so many experts, into a folder that the user calls `named`."""
    data = {"data": str(named / "calibration.jsonl"), "target_column": "target"}
    recipes = {
        "calibrate": {"model": str(named / "model"), **data, "methods": "reap,msmoe"},
        "compare": {**data, "eval": str(named / "evaluation.jsonl"), "methods": "msmoe,average", "experts": experts},
        "compress": {**data, "experts": experts},
        "distill": {"teacher": str(named / "model"), **data, "max_steps": 20},
        "evaluate": {**data, "data": str(named / "evaluation.jsonl")},
    }
    for name, options in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
