"""Trainers of TRL take a merged folder by its name, in a process that has no `hf_mcsmoe`."""

import json
from pathlib import Path

import pytest
from distilled import make_student
from merged import TESTS, example, run_python, tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "packed", "gkd"])
def test_a_trainer_of_trl_trains_the_experts_and_saves_what_loads(kind: str, tmp_path: Path) -> None:
    for name, model in (("merged", make_student("mixtral")), ("teacher", example("mixtral").base)):
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    done = run_python([str(TESTS / "trl_without_package.py"), "merged", "teacher", kind], tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text()) == {"experts": True, "same": True}
