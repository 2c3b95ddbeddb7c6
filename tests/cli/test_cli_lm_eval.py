"""Tasks of lm-eval from the command line: a local task, models side by side, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
from families import build
from helpers import Run
from merged import example, tokenizer

from hf_mcsmoe.evaluation.quality import multiple_choice
from hf_mcsmoe.layers.loading import load_model

ROWS = [(f"w{50 + row} w{60 + row}", [f"w{70 + row}", f"w{90 - row}"], row % 2) for row in range(6)]
TASK = """\
task: made_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
metric_list:
  - metric: acc
"""


@pytest.mark.filterwarnings("ignore")
def test_a_local_task_is_measured_as_we_measure_choices(tmp_path: Path, run: Run) -> None:
    build("mixtral").save_pretrained(tmp_path / "original")
    example("mixtral").merged.save_pretrained(tmp_path / "merged")
    for name in ("original", "merged"):
        tokenizer().save_pretrained(tmp_path / name)
    lines = [json.dumps({"context": text, "choices": choices, "right": right}) for text, choices, right in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "task.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    models = [tmp_path / "original", tmp_path / "merged"]
    code, out, error = run("evaluate", *models, "--lm-eval", tmp_path / "task.yaml", "--json", tmp_path / "out.json")
    assert code == 0, error
    assert "made choices acc" in out
    found = json.loads((tmp_path / "out.json").read_text())
    for folder in models:
        rows = [(text, [f" {choice}" for choice in choices], right) for text, choices, right in ROWS]
        expected = multiple_choice(load_model(str(folder)), tokenizer(), rows)["accuracy"]
        assert 100 * found[str(folder)]["made_choices acc"] == pytest.approx(expected)


def test_what_lm_eval_lacks_is_said(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "none.yaml").write_text("output_type: multiple_choice\n")
    code, _, error = run("evaluate", "nowhere", "--lm-eval", tmp_path / "none.yaml")
    assert (code, "describes no task" in error) == (1, True)
    code, _, error = run("evaluate", "nowhere", "--lm-eval", "copa", "--task", "copa")
    assert (code, "leave out --task" in error) == (1, True)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    code, _, error = run("evaluate", "nowhere", "--lm-eval", "copa")
    assert (code, 'pip install "hf_mcsmoe[lm-eval]"' in error) == (1, True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_refused(run: Run) -> None:
    code, _, error = run("evaluate", "nowhere", "--lm-eval", "nonsense_task")
    assert (code, "has no task 'nonsense_task'" in error) == (1, True)
