"""A model that is pruned to one count of experts everywhere is written as an ordinary one of its family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TRAINING
from families import build
from helpers import Run
from merged import run_python
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe import compress
from hf_mcsmoe.modeling.saving_mcsmoe import RECORD_FILE

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=False)
tokens = AutoTokenizer.from_pretrained("out", trust_remote_code=False)("what is 3", return_tensors="pt")
assert not any(name.startswith("hf_mcsmoe") for name in sys.modules)
print(type(model).__name__, *{layer.mlp.experts.down_proj.shape[0] for layer in model.model.layers})
with torch.no_grad():
    torch.save((tokens.input_ids, model(tokens.input_ids).logits), "logits.pt")
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The repair left", "ignore:The calibration")
def test_it_loads_elsewhere_with_neither_package_nor_remote_code_and_tells_what_was_done(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build("mixtral")
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [f"what is {number} {other} {(number * other) % 10}" for number in range(8) for other in range(8)]
    (tmp_path / "text.txt").write_text("\n".join(rows))
    made: list[Any] = []

    def spied(*arguments: Any, **options: Any) -> Any:
        made.append(compress(*arguments, **options))
        return made[0]

    monkeypatch.setattr("hf_mcsmoe.cli.compress.compress", spied)
    output = tmp_path / "out"
    options = ["--experts", "6", "--reduce", "prune", "--budget", "uniform", "--num-samples", "16"]
    code, _, err = run("compress", tmp_path / "base", "--data", tmp_path / "text.txt", *options, "--output", output)
    assert code == 0, err
    done = run_python(["-c", LOAD], tmp_path)
    assert done.stdout.split() == ["MixtralForCausalLM", "6"], done.stderr
    ids, found = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        torch.testing.assert_close(found, made[0](input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    names = {file.name for file in output.iterdir()}
    assert "pruned" in (output / "report.html").read_text()
    assert {"README.md", "mcsmoe_plan.json", "mcsmoe_record.json", "mcsmoe_recipe.yaml", "report.html"} <= names
    assert "trust_remote_code" not in (output / "README.md").read_text()
    record = json.loads((output / "mcsmoe_record.json").read_text())
    assert record["is_plain"]
    assert [step["title"] for step in record["steps"]] == ["Repair"]
    trained = ["--teacher", tmp_path / "base", "--data", tmp_path / "text.txt", "--output", tmp_path / "trained"]
    code, _, err = run("distill", output, *trained, *TRAINING, "--max-steps", 1)
    assert code == 0, err
    config, record = (json.loads((tmp_path / "trained" / name).read_text()) for name in ("config.json", RECORD_FILE))
    assert (config["model_type"], config["num_local_experts"], record["is_plain"]) == ("mixtral", 6, True)
    assert [step["title"] for step in record["steps"]] == ["Repair", "Distillation"]
    before, after = (load_file(folder / "model.safetensors") for folder in (output, tmp_path / "trained"))
    assert {name: value.shape for name, value in before.items()} == {
        name: value.shape for name, value in after.items()
    }
    assert any(not torch.equal(value, after[name]) for name, value in before.items() if "experts" in name)
