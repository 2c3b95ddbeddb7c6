"""Loads plain folders with Transformers alone, run by the tests in a process where `hf_mcsmoe` cannot be imported.

Usage: plain_without_package.py FOLDER ...   writes report.json, what went wrong by the folder's name, into the working
directory.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
import transformers


def check(folder: Path) -> None:
    """Load a folder by the class that its configuration names, and compare with the logits beside it."""
    expected = torch.load(folder.with_suffix(".pt"), weights_only=True)
    assert not list(folder.glob("*.py")), "there is code beside the weights"
    config = json.loads((folder / "config.json").read_text())
    assert not {"auto_map", "mcsmoe"} & config.keys(), "the configuration is not that of the family"
    kind = getattr(transformers, config["architectures"][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    assert not problems, problems
    with torch.no_grad():
        found = model.eval()(**expected["batch"]).logits
    torch.testing.assert_close(found, expected["logits"], atol=1e-4, rtol=1e-4)


def main() -> None:
    """Check all folders."""
    report = {}
    for name in sys.argv[1:]:
        try:
            check(Path(name))
            report[Path(name).name] = ""
        except Exception:
            report[Path(name).name] = traceback.format_exc()
    Path("report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
