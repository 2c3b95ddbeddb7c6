"""`hf-mcsmoe distill --preset task-specific` as a user types it, killed and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TEXT, TRAINING
from families import build
from helpers import Run
from merged import example, tokenizer
from safetensors.torch import load_file

from hf_mcsmoe import DistillationTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task")
    build("mixtral").save_pretrained(path / "mixtral")
    tokenizer().save_pretrained(path / "mixtral")
    (path / "text.txt").write_text(TEXT)
    return path


def _command(folder: Path, output: Path, *more: Any, model: str = "mixtral") -> list[Any]:
    given = ["distill", folder / model, "--teacher", folder / "mixtral", "--data", folder / "text.txt", *TRAINING]
    return [*given, "--max-steps", 4, "--save-steps", 1, "--output", output, *more]


PRESET = ("--preset", "task-specific", "--experts", "3", "--start", 0.25, "--end", 0.25)


@pytest.mark.slow
def test_experts_go_while_the_model_learns_and_a_killed_run_goes_on(
    folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(*_command(folder, tmp_path / "whole", *PRESET))
    assert code == 0, err
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 3)
    record = json.loads((tmp_path / "whole" / "mcsmoe_record.json").read_text())
    assert [step["title"] for step in record["steps"]] == ["Task-specific pruning", "Distillation"]
    assert record["steps"][1]["options"]["kd_weight"] == 0
    assert "preset: task-specific" in (tmp_path / "whole" / "mcsmoe_recipe.yaml").read_text()
    assert (tmp_path / "whole" / "report.html").is_file()
    step, done = DistillationTrainer.training_step, []

    def interrupted(self: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        done.append(0)
        if len(done) > 2:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(DistillationTrainer, "training_step", interrupted)
    assert run(*_command(folder, tmp_path / "parts", *PRESET))[0]
    monkeypatch.setattr(DistillationTrainer, "training_step", step)
    code, _, err = run(*_command(folder, tmp_path / "parts", *PRESET, "--resume"))
    assert code == 0, err
    assert "resumed from checkpoint-" in err
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


WRONG = [
    (["--preset", "task-specific"], "goes with --experts: give both"),
    (["--experts", "3"], "goes with --preset: give both"),
    (["--preset", "reap", "--experts", "3"], "reap is one of `hf-mcsmoe compress`"),
    ([*PRESET, "--rank", 2], "--rank 2 needs experts that stay"),
    ([*PRESET[:2], "--experts", "1"], "the 2 experts a layer that the routers need"),
    ([*PRESET[:4], "--start", 0.6, "--end", 0.5], "leave none of the 4 training steps"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_what_does_not_go_together_is_refused(
    options: list[Any], words: str, folder: Path, tmp_path: Path, run: Run
) -> None:
    code, _, err = run(*_command(folder, tmp_path / "out", *options))
    assert code
    assert words in " ".join(err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_only_an_original_has_experts_to_choose_among(folder: Path, tmp_path: Path, run: Run) -> None:
    example("mixtral").merged.save_pretrained(tmp_path / "merged")
    code, _, err = run(*_command(folder, tmp_path / "out", *PRESET, model=str(tmp_path / "merged")))
    assert code
    assert "has lost the experts to choose among: name the original" in " ".join(err.split())


def test_what_trains_is_told_where_it_is_done(folder: Path, tmp_path: Path, run: Run) -> None:
    data = ["--data", folder / "text.txt", "--output", tmp_path / "out"]
    code, _, err = run("compress", folder / "mixtral", "--preset", "task-specific", "--experts", "0.5", *data)
    assert code
    assert "run `hf-mcsmoe distill MODEL --teacher MODEL --preset task-specific" in " ".join(err.split())
    code, out, _ = run("methods")
    assert code == 0
    assert "task-specific [arXiv 2206.00277]" in " ".join(out.split())
