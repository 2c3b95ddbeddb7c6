"""Teacher outputs on disk: training from them is training with the teacher; killed runs; what they do not fit."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from distilled import KINDS, Row, make_rows, make_student, make_trainer, stacked
from families import VOCAB_SIZE, build
from merged import example, tokenizer
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

from hf_mcsmoe import store_teacher_outputs
from hf_mcsmoe.distillation.teacher_outputs import TeacherOutputs, data_fingerprint

# Two epochs of shuffled rows; the last batch of an epoch, and its last accumulated one, have fewer rows.
RUN = {
    "max_steps": 4,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "warmup_steps": 0,
    "kd_weight": 5.0,
    "save_strategy": "no",
}


def unequal_rows() -> list[dict[str, list[int]]]:
    """Return rows of different lengths, as tokenizers make them."""
    return [
        {key: value[: 3 + number % 4].tolist() for key, value in row.items()} for number, row in enumerate(make_rows())
    ]


def trained(name: str, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Train with `RUN`; returns the weights."""
    collator = DataCollatorForSeq2Seq(tokenizer())
    trainer = make_trainer(name, folder, rows=unequal_rows(), data_collator=collator, **{**RUN, **options})
    trainer.train()
    return dict(trainer.student.named_parameters())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_with_the_whole_vocabulary_training_is_as_with_the_teacher(name: str, workers: int, tmp_path: Path) -> None:
    expected = trained(name, tmp_path / "live")
    stored = {"teacher_outputs": str(tmp_path / "stored"), "teacher_top_k": VOCAB_SIZE}
    first = trained(name, tmp_path / "first", **stored)
    again = trained(name, tmp_path / "again", **stored, teacher=False, dataloader_num_workers=workers)
    before = dict(make_student(name).named_parameters())
    assert any(not torch.allclose(value, before[key], atol=1e-3) for key, value in expected.items())
    for key, value in expected.items():
        torch.testing.assert_close(first[key], value, atol=1e-6, rtol=1e-4)
        assert torch.equal(again[key], first[key])


def test_what_is_stored_is_the_teachers_distribution_at_the_labels_that_count(tmp_path: Path) -> None:
    name, rows, top_k = "mixtral", make_rows(), 5
    folder = store_teacher_outputs(example(name).base, rows, tmp_path / "stored", temperature=3.0, top_k=top_k)
    arrays, place = TeacherOutputs(folder).arrays, 0
    for row in rows:
        with torch.no_grad():
            logits = example(name).base(**stacked([row])).logits[0].double()
        for position in range(1, len(row["labels"])):
            if row["labels"][position] == -100:
                continue
            shares = sorted(((logits[position - 1] / 3).softmax(-1)).tolist(), reverse=True)
            np.testing.assert_allclose(np.exp(arrays["log_probs"][place]), shares[:top_k], rtol=1e-4)
            assert np.exp(arrays["rest"][place]) == pytest.approx(sum(shares[top_k:]), rel=1e-4)
            assert arrays["labels"][place] == row["labels"][position]
            place += 1
    assert place == len(arrays["rest"]) == arrays["offsets"][-1]


def test_fewer_tokens_lose_something_and_never_add(tmp_path: Path) -> None:
    found = {}
    for top_k in (1, 8, VOCAB_SIZE):
        options = {"teacher_outputs": str(tmp_path / str(top_k)), "teacher_top_k": top_k, "save_strategy": "no"}
        trainer = make_trainer("mixtral", tmp_path / "run", max_steps=1, per_device_train_batch_size=8, **options)
        trainer.train()
        found[top_k] = trainer.state.log_history[0]["kd_loss"]
    assert 0 < found[1] < found[8] < found[VOCAB_SIZE]


def test_the_trainer_holds_no_teacher_and_evaluates_the_task(tmp_path: Path) -> None:
    folder = str(tmp_path / "stored")
    trainer = make_trainer("mixtral", tmp_path, teacher_outputs=folder, save_strategy="no")
    assert trainer.teacher is None
    trainer.train()
    metrics = trainer.evaluate(make_rows())
    assert metrics["eval_task_loss"] == pytest.approx(metrics["eval_loss"])
    assert "eval_kd_loss" not in metrics
    trainer.save_model(tmp_path / "final")
    assert "from the original model at temperature" in (tmp_path / "final" / "README.md").read_text()


class Killed(list):
    """Rows read for the labels, for the fingerprint and for three batches of two before the run is killed."""

    reads = 8 + 8 + 6

    def __getitem__(self, number: int) -> Any:
        if self.reads == 0:
            raise KeyboardInterrupt
        self.reads -= 1
        return super().__getitem__(number)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    case, folder = example("mixtral"), tmp_path / "stored"
    expected = store_teacher_outputs(case.base, make_rows(), tmp_path / "whole", batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        store_teacher_outputs(case.base, Killed(make_rows()), folder, batch_size=2)
    assert not folder.exists()
    with pytest.raises(ValueError, match="no complete teacher outputs"):
        TeacherOutputs(folder)
    partial = folder.with_name(".stored.mcsmoe-work") / "outputs"
    assert json.loads((partial / "progress.json").read_text())["rows"] == 6
    forwards: list[int] = []
    handle = case.base.register_forward_pre_hook(lambda *given: forwards.append(1))
    store_teacher_outputs(case.base, make_rows(), folder, batch_size=2)
    handle.remove()
    assert len(forwards) == 1
    assert not partial.parent.exists()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in expected.iterdir()
    }


def test_what_a_killed_run_left_for_other_data_is_thrown_away(tmp_path: Path) -> None:
    case, partial = example("mixtral"), tmp_path / ".stored.mcsmoe-work" / "outputs"
    partial.parent.mkdir()
    (tmp_path / "stored.partial").mkdir()
    (tmp_path / "stored.partial" / "notes.txt").write_text("mine")
    store_teacher_outputs(case.base, make_rows()[:4], tmp_path / "other").rename(partial)
    (partial / "progress.json").write_text('{"rows": 2}')
    store_teacher_outputs(case.base, make_rows(), tmp_path / "stored")
    assert len(TeacherOutputs(tmp_path / "stored").arrays["offsets"]) == 9
    assert (tmp_path / "stored.partial" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["labels.npy", "log_probs.npy", "teacher_outputs.json"])
def test_half_a_file_is_named(name: str, tmp_path: Path) -> None:
    folder = store_teacher_outputs(example("mixtral").base, make_rows(), tmp_path / "stored")
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"{name} is cut off or damaged .*: delete"):
        _ = TeacherOutputs(folder).arrays


def test_rows_count_by_their_content() -> None:
    rows, model = unequal_rows(), example("mixtral").base
    same = datasets.Dataset.from_list([{**row, "text": "not taken"} for row in rows])
    assert data_fingerprint(rows, model) == data_fingerprint(same, model)
    assert data_fingerprint(rows, model) == data_fingerprint(same.with_format("numpy"), model)
    assert data_fingerprint(rows[::-1], model) != data_fingerprint(rows, model)
    texts = [[{"text": text}] for text in ("a", "b")]
    assert data_fingerprint(texts[0], model) != data_fingerprint(texts[1], model)


def test_outputs_are_sent_to_workers_by_name(tmp_path: Path) -> None:
    outputs = TeacherOutputs(store_teacher_outputs(example("mixtral").base, make_rows(), tmp_path / "stored"))
    assert outputs.arrays["rest"].nbytes > 0
    assert len(pickle.dumps(outputs)) < 500
    assert pickle.loads(pickle.dumps(outputs)).description == outputs.description


class Stream(torch.utils.data.IterableDataset):
    """Rows without numbers."""

    def __iter__(self) -> Any:
        return iter(make_rows())


def masked() -> list[Row]:
    """Return rows none of whose labels counts."""
    return [{**row, "labels": torch.full_like(row["labels"], -100)} for row in make_rows()]


def random_masks(rows: list[Row]) -> Row:
    """Collate, with some labels masked at random."""
    batch = stacked(rows)
    return {**batch, "labels": batch["labels"].masked_fill(torch.rand(batch["labels"].shape) < 0.5, -100)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": make_rows()[::-1]}, "made from another data set"),
        ({"kd_temperature": 1.0}, "at temperature 2.0, not 1.0"),
        ({"hidden_weight": 1.0}, "the teacher's hidden states, which teacher_outputs does not hold"),
        ({"expert_weight": 1.0}, "the outputs of the teacher's layers of experts"),
        ({"reference_kd": True}, "logits at masked positions too"),
        ({"teacher_outputs": "nowhere"}, "needs a teacher, or teacher_outputs"),
        ({"data_collator": random_masks}, "are not those that .* was made with"),
        ({"teacher": example("mixtral").merged}, "holds the outputs of the teacher '', not of the one given"),
        ({"teacher": "some/other"}, "holds the outputs of the teacher '', not of the one given"),
    ],
    ids=["data", "temperature", "hidden", "expert", "reference", "none", "collator", "teacher", "name"],
)
def test_outputs_that_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = store_teacher_outputs(example("mixtral").base, make_rows(), tmp_path / "stored")
    options = {"teacher_outputs": str(folder), "teacher": False, **change}
    with pytest.raises(ValueError, match=message):
        make_trainer("mixtral", tmp_path / "run", **options).train()


DAMAGED: list[tuple[Callable[[Path], Any], str]] = [
    (
        lambda folder: np.save(folder / "rest.npy", np.zeros(3, np.float32)),
        "'rest': 3.* not .*store them anew",
    ),
    (lambda folder: np.save(folder / "offsets.npy", np.arange(4)), "'offsets': 4"),
    (lambda folder: (folder / "teacher_outputs.json").write_text('{"format_version": 1}'), "does not tell teacher, "),
    (lambda folder: (folder / "teacher_outputs.json").write_text("{}"), "was written by another version"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_damaged_outputs_are_refused(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folder = store_teacher_outputs(example("mixtral").base, make_rows(), tmp_path / "stored")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        make_trainer("mixtral", tmp_path / "run", teacher_outputs=str(folder), teacher=False)


def test_outputs_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    folder = store_teacher_outputs(build("mixtral"), make_rows(), tmp_path / "stored")
    student = make_student("mixtral")
    student.resize_token_embeddings(40)
    with pytest.raises(ValueError, match="The teacher has 128 tokens in its vocabulary, the student 40"):
        make_trainer("mixtral", tmp_path / "run", model=student, teacher=False, teacher_outputs=str(folder))


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Stream(), {}, "a Stream does not have"),
        (masked(), {}, r"No label of the data set counts"),
        ([{"input_ids": torch.ones(3)}], {}, "Distillation needs labels; a batch has input_ids"),
        (make_rows(), {"data_collator": random_masks}, "differ from one pass to the next"),
    ],
    ids=["stream", "masked", "labels", "random"],
)
def test_data_that_cannot_be_stored_is_refused(
    dataset: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        store_teacher_outputs(example("mixtral").base, dataset, tmp_path / "stored", **options)
    assert not (tmp_path / "stored").exists()


def test_an_existing_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "stored").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        store_teacher_outputs(example("mixtral").base, make_rows(), tmp_path / "stored")


def test_labels_may_come_from_the_collator(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "labels"} for row in unequal_rows()]
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    options = {"rows": rows, "data_collator": collator, "teacher_outputs": str(tmp_path / "stored")}
    make_trainer("mixtral", tmp_path, save_strategy="no", **options).train()
    offsets = TeacherOutputs(tmp_path / "stored").arrays["offsets"]
    assert np.diff(offsets).tolist() == [len(row["input_ids"]) - 1 for row in rows]
