"""Calibration data from every kind of source, and what wrong ones are told."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from families import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe.data.calibration import calibration_batches
from hf_mcsmoe.data.chat import Chat
from hf_mcsmoe.data.spans import SpanNoise
from hf_mcsmoe.data.text import read_samples

ROWS = [{"question": f"what is {n}", "answer": f"it is {n}"} for n in range(5)]


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


SOURCES = {
    "lines.txt": "one\ntwo\nthree\n",
    "paragraphs.txt": "one\n\ntwo\n\n\nthree",
    "list.json": json.dumps(["one", "two", "three"]),
    "rows.json": json.dumps([{"text": text} for text in ("one", "two", "three")]),
    "named.json": json.dumps({"first": "one\n\ntwo", "second": "three"}),
    "rows.jsonl": "\n".join(json.dumps({"text": text, "id": 1}) for text in ("one", "two", "three")),
    "rows.csv": "text,id\none,1\ntwo,2\nthree,3\n",
    "rows.tsv": "text\tid\none\t1\ntwo\t2\nthree\t3\n",
    "CAPITALS.JSONL": '{"text": "one"}\n\n{"text": "two"}\n{"text": "three"}\n',
    "CAPITALS.CSV": "TEXT\none\ntwo\nthree\n",
    "texts.jsonl": '"one"\n"two"\n"three"',
    "lines.json": '{"text": "one"}\n{"text": "two"}\n{"text": "three"}',
    "field.json": json.dumps({"version": 1.1, "data": [{"text": text} for text in ("one", "two", "three")]}),
    "texts_by_name.json": json.dumps({"a": ["one"], "b": ["two", "three"]}),
    "splits.json": json.dumps({"test": [{"text": "no"}], "train": ["one", "two", "three"]}),
    "mark.txt": "\ufeffone\r\ntwo\rthree\r\n",
    "mark.jsonl": '\ufeff{"text": "one"}\r\n{"text": "two"}\r\n{"text": "three"}\r\n',
    "mark.csv": "\ufefftext,id\r\none,1\r\ntwo,2\r\nthree,3\r\n",
    "gaps.jsonl": '{"text": "one"}\n{"text": null}\n{"text": "two"}\n{"id": 3}\n{"text": " "}\n{"text": "three"}',
    "file.log": "one\ntwo\nthree",
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_of_file_gives_its_texts(name: str, tmp_path: Path) -> None:
    assert read_samples(write(tmp_path / name, SOURCES[name])) == [("one", None), ("two", None), ("three", None)]


def test_gzipped_files_and_folders_of_data_sets(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(b"one\ntwo"))
    expected = [(row["question"], row["answer"]) for row in ROWS]
    options = {"column": "question", "target_column": "answer"}
    assert read_samples(str(tmp_path / "train.jsonl.gz"), **options) == expected
    assert read_samples(str(tmp_path / "text.txt.gz")) == [("one", None), ("two", None)]
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", lines)
    assert sorted(read_samples(str(folder), **options)) == sorted(expected)


def test_cells_of_tables_are_the_text_that_stands_there(tmp_path: Path) -> None:
    cells = [("NA", "01"), ("null", "1.50"), ("a\nb", "nan"), ("x" * 200_000, "TRUE"), ("1", "2020-01-01")]
    table = 'q,a\nNA,01\nnull,1.50\n"a\nb",nan\n' + "x" * 200_000 + ",TRUE\n1,2020-01-01\n"
    options = {"column": "q", "target_column": "a"}
    assert read_samples(write(tmp_path / "a.csv", table), **options) == cells
    assert read_samples(write(tmp_path / "a.tsv", table.replace(",", "\t")), **options) == cells
    (tmp_path / "a.CSV.GZ").write_bytes(gzip.compress(table.encode()))
    assert read_samples(str(tmp_path / "a.CSV.GZ"), **options) == cells
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.csv", table)
    write(folder / "test.csv", "q,a\nno,no\n")
    assert read_samples(str(folder), **options) == cells
    Dataset.from_dict({"q": [q for q, _ in cells], "a": [a for _, a in cells]}).to_parquet(tmp_path / "a.parquet")
    assert read_samples(str(tmp_path / "a.parquet"), **options) == cells


MESSAGES = ({"role": "user", "content": "what"}, {"role": "assistant", "content": "it"})
CHATS = {
    "messages": {"messages": list(MESSAGES), "id": "7"},
    "sharegpt": {"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "it"}]},
    "prompt": {"prompt": [MESSAGES[0]], "completion": [MESSAGES[1]]},
}


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "row.json", "rows.parquet"])
def test_rows_of_messages_are_conversations(kind: str, name: str, tmp_path: Path) -> None:
    row, path = CHATS[kind], tmp_path / name
    if name == "row.json" and kind == "prompt":
        pytest.skip("two lists by name")
    contents = {"rows.jsonl": json.dumps(row), "rows.json": json.dumps([row, row]), "row.json": json.dumps(row)}
    if name in contents:
        write(path, contents[name])
    else:
        Dataset.from_list([row]).to_parquet(path)
    assert all(sample == (Chat(MESSAGES), None) for sample in read_samples(str(path)))


def test_a_prompt_and_its_completion_are_one_text_unless_a_column_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", json.dumps({"prompt": "what is", "completion": " it"}))
    assert read_samples(path) == [("what is it", None)]
    assert read_samples(path, column="prompt") == [("what is", None)]
    assert read_samples(path, target_column="completion") == [("what is", " it")]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("missing.txt", None, {}, "no file"),
        ("no-such-set", None, {}, "Cannot load the data set 'no-such-set'"),
        ("empty.txt", b" \n\n", {}, "holds no text"),
        ("empty.jsonl", b"", {}, "empty.jsonl"),
        ("binary.txt", b"\xff\xfe\x00\x93", {}, "not a text file"),
        ("broken.txt.gz", b"\x1f\x8bnothing", {}, "not a text file"),
        ("broken.json", b"{", {}, "not valid JSON"),
        ("rows.jsonl", b'{"text": "a", "id": 3}', {"column": "txt"}, "no column 'txt'; it has 'text', 'id'"),
        ("rows.jsonl", b'{"text": "a"}', {"target_column": "label"}, "no column 'label'"),
        ("plain.txt", b"a b", {"column": "text"}, "holds texts, not rows .* leave out column 'text'"),
        ("texts.json", b'["a b"]', {"target_column": "label"}, "leave out column 'label'"),
        (" ", None, {}, "names no data"),
        ("two.jsonl", b'{"a": "x", "b": "y"}', {}, "name the one with the text"),
        ("numbers.jsonl", b'{"text": 3}', {"column": "text"}, "holds int, not text"),
        ("dict.jsonl", b'{"text": "a"}\n{"text": {"en": "b"}}', {}, "'text' holds dict, not text .*, in row 2 of"),
        ("list.json", b'["a", 3]', {}, "Row 2 of .* holds int, not text"),
        ("null.json", b'["a", null]', {}, "Row 2 of .* holds NoneType"),
        ("bool.jsonl", b"true", {}, "Row 1 of .* holds bool"),
        ("target.jsonl", b'{"a": "x", "b": 1}', {"column": "a", "target_column": "b"}, "'b' holds int, .* row 1 of"),
        ("number.json", b"3", {}, "holds int, not a list"),
        ("columns.json", b'{"text": {"0": "a", "1": "b"}}', {}, r"an object with 'text' \(dict\)"),
        ("lists.json", b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}', {}, "name the one to read"),
        ("nested.json", b'[{"title": "a", "paragraphs": [{"x": 1}]}]', {}, "name the one with the text"),
        ("pretty.jsonl", b'{\n"text": "a"\n}', {}, "Line 1 of .* ends in .json"),
        ("wide.txt", "one two".encode("utf-16"), {}, "not a text file in UTF-8"),
        ("wide.csv", "text\none".encode("utf-16-le"), {}, "holds zero bytes"),
        ("latin.jsonl", '{"text": "\xe9"}'.encode("latin-1"), {}, "not a text file in UTF-8"),
        ("cells.csv", b"text,id\none, two,3\n", {}, "Line 2 of .* has 3 cells, its head names 2"),
        ("twice.csv", b"text,text\na,b\n", {}, "names a column twice"),
        ("quote.csv", b'text\n"one', {}, "is not a table"),
        ("damaged.parquet", b"PAR1nothing", {}, "Cannot load the data set"),
        ("speaker.jsonl", b'{"conversations": [{"from": "bard", "value": "a"}]}', {}, "In row 1 of .* 'from' one of"),
        ("silent.jsonl", b'{"messages": [{"role": "user"}]}', {}, "In row 1 of .* a role and a content"),
        ("half.jsonl", b'{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}', {}, "one of prompt and"),
    ],
)
def test_wrong_sources_are_told_what_is_wrong(
    name: str, content: bytes | None, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    source = str(path) if "." in name else name
    with pytest.raises(ValueError, match=message):
        read_samples(source, **options)


def test_batches_of_a_decoder_are_padded_and_masked(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "text.txt", "what is 1\nit\nwhat is it 2 3")
    batches = calibration_batches(read_samples(path), tokenizer, build("mixtral"), batch_size=2)
    assert sorted(int(length) for batch in batches for length in batch["attention_mask"].sum(1)) == [1, 3, 5]
    for batch in batches:
        assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == tokenizer.pad_token_id)


def test_batches_of_an_encoder_decoder_have_targets(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, ROWS)))
    samples = read_samples(path, column="question", target_column="answer")
    (batch,) = calibration_batches(samples, tokenizer, build("switch_transformers"), batch_size=5)
    answers = {tuple(tokenizer(row["answer"])["input_ids"]) for row in ROWS}
    assert {tuple(token for token in row if token != -100) for row in batch["labels"].tolist()} == answers


def test_the_text_is_corrupted_as_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    words = [*tokenizer.get_vocab(), *(f"<extra_id_{number}>" for number in range(8))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sentinels = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    samples = [(" ".join(str(number % 10) for number in range(40)), None)]
    for noise, masked in ((SpanNoise(), 6), (SpanNoise(0.5), 20), (SpanNoise(mean_span=4, fixed_spans=True), 8)):
        (batch,) = calibration_batches(samples, sentinels, build("switch_transformers"), noise=noise)
        assert (batch["labels"] < len(words) - 8).sum() == masked + 1, "and the end"


def test_samples_are_drawn_by_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    samples, model = [(f"what is {n} {m}", None) for n in range(10) for m in range(10)], build("mixtral")
    batches = [calibration_batches(samples, tokenizer, model, num_samples=9, seed=seed) for seed in (0, 0, 1)]
    drawn = [torch.cat([batch["input_ids"] for batch in part]) for part in batches]
    assert torch.equal(drawn[0], drawn[1])
    assert len(drawn[0]) == 9
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", ["mixtral", "switch_transformers"])
def test_the_tokenizer_is_left_as_it_was(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = None
    before = (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer("what is it 1 2 3"))
    samples = [("what is 1", None), ("it", None)]
    batches = calibration_batches(samples, tokenizer, build(name), max_length=2, batch_size=2)
    assert batches[0]["attention_mask"].sum() == 3
    assert before == (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
        tokenizer("what is it 1 2 3"),
    )


def test_a_tokenizer_of_another_model_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("mixtral")
    model.resize_token_embeddings(5)
    with pytest.raises(ValueError, match="belongs to another model"):
        calibration_batches([("what is 1", None)], tokenizer, model)


def test_without_samples_there_is_nothing_to_calibrate_on(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no samples"):
        calibration_batches([], tokenizer, build("mixtral"))


def test_padding_stands_on_the_right_and_needs_no_token_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    """A row has the positions that it has alone, whatever side the tokenizer pads on for generation."""
    samples, model = [("what is 1", None), ("it", None)], build("mixtral")
    expected = calibration_batches(samples, tokenizer, model)[0]["attention_mask"]
    assert expected.tolist() == [[1, 0, 0], [1, 1, 1]]
    tokenizer.padding_side, tokenizer.pad_token, tokenizer.eos_token = "left", None, None
    (batch,) = calibration_batches(samples, tokenizer, model)
    assert torch.equal(batch["attention_mask"], expected)
    assert "labels" not in batch, "a model without an encoder is not asked for a loss"
