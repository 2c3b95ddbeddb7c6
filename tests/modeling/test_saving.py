"""Saving: all files or none, beside what is there; pushing to the Hub; the model card and its example."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from families import build
from helpers import logits
from hub import Hub, running_hub
from huggingface_hub import ModelCard
from merged import ALL, Example, example, merge, run_python, save, stored_experts, tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    modeling_utils,
)

from hf_mcsmoe.attached import attach_record, record_of

FILES = {
    *("README.md", "config.json", "generation_config.json", "mcsmoe_plan.json", "mcsmoe_record.json"),
    *("model.safetensors",),
    *("companions_mcsmoe.py", "configuration_mcsmoe.py", "constants_mcsmoe.py", "experts_mcsmoe.py"),
    *("folders_mcsmoe.py", "forward_mcsmoe.py", "generated_mcsmoe.py", "losparse_mcsmoe.py", "plain_mcsmoe.py"),
    *("modeling_mcsmoe.py", "pruned_mcsmoe.py", "quantized_mcsmoe.py", "router_mcsmoe.py", "saving_mcsmoe.py"),
}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def case() -> Example:
    return example("mixtral")


@pytest.fixture
def source(case: Example, tmp_path: Path) -> Path:
    """A base model's folder, with the files that people put beside the weights."""
    folder = tmp_path / "base-model"
    case.base.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    (folder / "LICENSE").write_text("Do as you like.")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    return folder


def _reloaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def _failing(error: type[BaseException], after: int) -> Callable[..., None]:
    """Return a function that writes some safetensors files and fails at the next, half of which it writes."""
    written: list[str] = []
    write = modeling_utils.safe_save_file

    def fail(tensors: dict[str, torch.Tensor], path: str, **kwargs: object) -> None:
        if len(written) == after:
            Path(path).write_bytes(b"half of it")
            raise error("no space left")
        written.append(path)
        write(tensors, path, **kwargs)

    return fail


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_save_leaves_what_was_there(
    error: type[BaseException], exists: bool, case: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    if exists:
        case.merged.save_pretrained(folder)
    before = {file.name: file.read_bytes() for file in folder.glob("*")}
    _, other = merge(build("mixtral", seed=1), "mixtral")
    monkeypatch.setattr(modeling_utils, "safe_save_file", _failing(error, after=2))
    with pytest.raises(error, match="no space left"):
        other.save_pretrained(folder, max_shard_size="100KB")
    assert {file.name: file.read_bytes() for file in folder.glob("*")} == before
    assert [file.name for file in tmp_path.iterdir()] == ["saved"] * exists


KILLED = """
import os, sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
transformers.modeling_utils.safe_save_file = lambda *arguments, **kwargs: os._exit(9)
for target in sys.argv[1:]:
    if not os.fork():
        model.save_pretrained(target)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_killed_save_leaves_no_checkpoint_and_the_old_one_whole(case: Example, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    case.merged.save_pretrained(old)
    done = run_python(["-c", KILLED, str(old), str(new)], tmp_path)
    assert done.stdout.split() == ["9", "9"], done.stderr
    assert not new.exists()
    assert torch.equal(logits(_reloaded(old), case.batch), logits(case.merged, case.batch))


def test_a_save_replaces_the_weights_that_are_there(case: Example, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    case.merged.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    case.merged.save_pretrained(folder, variant="other")
    case.merged.save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == FILES | {"notes.txt", "model.other.safetensors"}
    assert torch.equal(logits(_reloaded(folder), case.batch), logits(case.merged, case.batch))


def test_arguments_are_taken_in_the_librarys_order(case: Example, tmp_path: Path) -> None:
    case.merged.save_pretrained(tmp_path / "saved", True, None, False, "100KB", "other")
    assert len(list((tmp_path / "saved").glob("model.other-*.safetensors"))) > 2
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    case.merged.save_pretrained(tmp_path / "not here", False)
    assert not (tmp_path / "not here").exists()
    with pytest.raises(TypeError, match="multiple values for argument 'is_main_process'"):
        case.merged.save_pretrained(tmp_path / "not here", False, is_main_process=True)


def test_tags_join_those_of_the_card(case: Example, tmp_path: Path) -> None:
    case.merged.save_pretrained(tmp_path / "plain")
    before = ModelCard.load(tmp_path / "plain" / "README.md")
    case.merged.save_pretrained(tmp_path / "saved", tags=["mine", "mcsmoe"])
    after = ModelCard.load(tmp_path / "saved" / "README.md")
    assert after.data.tags == [*before.data.tags, "mine"]
    assert after.text.replace('"saved"', '"plain"').replace("=saved,", "=plain,") == before.text
    loaded = _reloaded(tmp_path / "saved")
    loaded.add_model_tags("told before")
    (tmp_path / "saved" / "README.md").unlink()
    loaded.save_pretrained(tmp_path / "without card", tags="one")
    assert ModelCard.load(tmp_path / "without card" / "README.md").data.tags == ["told before", "one"]


def test_other_processes_write_nothing(case: Example, tmp_path: Path) -> None:
    case.merged.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()
    case.merged.save_pretrained(tmp_path / "saved")
    case.merged.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert {file.name for file in (tmp_path / "saved").iterdir()} == FILES


def test_a_save_follows_links_and_relative_paths(
    case: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    case.merged.save_pretrained(tmp_path / "link")
    assert {file.name for file in (tmp_path / "real").iterdir()} == FILES
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    case.merged.save_pretrained(".")
    assert {file.name for file in Path.cwd().iterdir()} == FILES
    assert 'from_pretrained("here"' in Path("README.md").read_text()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_an_error(case: Example, tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        case.merged.save_pretrained(tmp_path / "parent" / "saved")


def test_a_file_in_the_place_of_the_folder_is_an_error(case: Example, tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("a file")
    with pytest.raises(OSError, match="saved"):
        case.merged.save_pretrained(tmp_path / "saved")
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


def test_what_lies_beside_the_source_is_carried_over(source: Path, tmp_path: Path) -> None:
    _, merged = merge(AutoModelForCausalLM.from_pretrained(source), "mixtral")
    merged.save_pretrained(tmp_path / "saved")
    carried = TOKENIZER_FILES | {"LICENSE", "chat_template.jinja"}
    assert {file.name for file in (tmp_path / "saved").iterdir()} == FILES | carried
    for name in carried:
        assert (tmp_path / "saved" / name).read_bytes() == (source / name).read_bytes(), name
    texts = [file.read_text() for file in (tmp_path / "saved").iterdir() if file.suffix != ".safetensors"]
    assert not any(str(tmp_path) in text for text in texts)


def test_the_tokenizer_is_read_by_the_class_that_read_the_sources(source: Path, tmp_path: Path) -> None:
    """Transformers reads a Mixtral's tokenizer as its file says, whatever class the settings name."""
    settings = source / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    _, merged = merge(AutoModelForCausalLM.from_pretrained(source), "mixtral")
    merged.save_pretrained(tmp_path / "saved")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "saved"))
    assert type(after) is type(before)
    assert after("w5 w6").input_ids == before("w5 w6").input_ids == [5, 6]


@pytest.mark.filterwarnings("ignore:.*is not to be found here")
@pytest.mark.parametrize(
    ("name_or_path", "base_model", "title"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1", "Mixtral-8x7B-v0.1"),
        ("{source}", None, "base-model"),
        ("../models/mine", None, "mine"),
        ("", None, "mixtral"),
    ],
)
def test_the_card_tells_the_hub_what_the_model_is(
    name_or_path: str, base_model: str | None, title: str, source: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    model.name_or_path = model.config.name_or_path = name_or_path.format(source=source)
    plan, merged = merge(model, "mixtral")
    merged.save_pretrained(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert (card.data.base_model, card.data.license) == (base_model, "mit" if "source" in name_or_path else None)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert {"mcsmoe", "custom_code", "arxiv:2310.01334"} <= set(card.data.tags)
    assert f"\n# {title} with merged experts\n" in card.text
    for size in (model.num_parameters(), merged.num_parameters(), *plan.provenance["tokens"].values()):
        assert f"{size:,}" in card.text
    for layer, kept in zip(plan.layers, stored_experts(merged), strict=True):
        assert f"| `{layer}` | 8 | {kept} |" in card.text


@pytest.mark.slow
def test_the_cards_examples_run_as_they_stand(tmp_path: Path) -> None:
    classes = {"mixtral": "AutoModelForCausalLM", "switch_transformers": "AutoModelForSeq2SeqLM"}
    code = ""
    for name, auto_class in classes.items():
        card = (save(example(name), tmp_path) / "README.md").read_text()
        block = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        assert f"\nmodel = {auto_class}.from_pretrained" in block
        code += f"{block}\nprint(type(model).__name__)\n"
    done = run_python(["-c", code], cwd=tmp_path)
    printed = [line for line in done.stdout.splitlines() if line.startswith("MCSMoE")]
    assert printed == [f"MCSMoE{type(example(name).base).__name__}" for name in classes], done.stderr


PUSH = """
import sys, torch, transformers
folder, scratch = sys.argv[1:]
expected = torch.load(f"{folder}.pt")
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
commit = {"commit_message": "Small", "token": "secret", "revision": "v1"}
model.push_to_hub("first", private=True, max_shard_size="100KB", tags=["mine"], **commit)
model.save_pretrained(f"{scratch}/kept", push_to_hub=True, repo_id="team/second", private=True, token="secret")
model.save_pretrained(f"{scratch}/third", True, None, True, token="secret")
for repo_id in ("me/first", "team/second", "me/third"):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True)
    assert torch.equal(loaded(**expected["batch"]).logits, expected["logits"]), repo_id
    assert transformers.AutoTokenizer.from_pretrained(repo_id)("w5 w6").input_ids == [5, 6]
loaded.save_pretrained(f"{scratch}/again")
"""


@pytest.mark.slow
def test_a_push_uploads_all_files_from_where_they_load(case: Example, tmp_path: Path) -> None:
    folder = save(case, tmp_path)
    with running_hub() as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = run_python(["-c", PUSH, str(folder), str(tmp_path)], tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    _check_uploads(hub)
    kept = {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()}
    assert hub.files["team/second"] == kept
    assert {file.name for file in (tmp_path / "again").iterdir()} == FILES | TOKENIZER_FILES
    assert 'from_pretrained("again"' in (tmp_path / "again" / "README.md").read_text()


def _check_uploads(hub: Hub) -> None:
    assert [(request["name"], request.get("visibility")) for request in hub.created] == [
        ("first", "private"),
        ("second", "private"),
        ("third", None),
    ]
    assert (hub.commits[0]["summary"], hub.branches) == ("Small", ["me/first@v1"])
    first = hub.files["me/first"]
    assert (FILES | TOKENIZER_FILES) - {"model.safetensors"} <= first.keys()
    assert len([name for name in first if name.endswith(".safetensors")]) > 2
    assert hub.files["me/third"].keys() == FILES | TOKENIZER_FILES
    tags = {repo_id: ModelCard(files["README.md"].decode()).data.tags for repo_id, files in hub.files.items()}
    assert tags["me/first"] == [*tags["me/third"], "mine"]
    for repo_id, files in hub.files.items():
        assert f'from_pretrained("{repo_id}"' in files["README.md"].decode()


SAVE_AGAIN = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[2])
"""


@pytest.mark.slow
def test_a_reloaded_model_is_saved_without_a_warning(tmp_path: Path) -> None:
    folder = save(example("mixtral"), tmp_path)
    done = run_python(["-c", SAVE_AGAIN, str(folder), str(tmp_path / "again")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "can yield errors" not in done.stderr
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_record_of_a_model_under_another_head_names_the_class_that_loads_that(tmp_path: Path) -> None:
    folder = save(example("mixtral"), tmp_path)
    assert record_of(AutoModelForCausalLM.from_pretrained(folder)).auto_class == "AutoModelForCausalLM"
    config = AutoConfig.from_pretrained(folder, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
    assert record_of(model).auto_class == "AutoModelForSequenceClassification"
    attach_record(model, record_of(model))
    model.save_pretrained(tmp_path / "head")
    assert "AutoModelForSequenceClassification.from_pretrained(" in (tmp_path / "head" / "README.md").read_text()
    assert json.loads((tmp_path / "head" / "mcsmoe_record.json").read_text())["auto_class"] == (
        "AutoModelForSequenceClassification"
    )


HEADS = """
import json, sys
import transformers
from pathlib import Path
for folder in sys.argv[1:]:
    for name in json.loads((Path(folder) / "config.json").read_text())["auto_map"]:
        try:
            made = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
            print(Path(folder).name, name, type(made).__name__)
        except Exception as error:
            print(Path(folder).name, name, f"failed: {error!r}"[:300].replace(chr(10), " "))
"""


def _check_heads(names: list[str], folder: Path) -> None:
    folders = [save(example(name), folder) for name in names]
    done = run_python(["-c", HEADS, *map(str, folders)], folder)
    assert done.returncode == 0, done.stderr
    for name, path in zip(names, folders, strict=True):
        entries = json.loads((path / "config.json").read_text())["auto_map"]
        lines = [line.split(" ", 2)[1:] for line in done.stdout.splitlines() if line.startswith(f"{path.name} ")]
        made = dict(lines)
        assert made.keys() == entries.keys()
        models = {auto: entry.rpartition(".")[2] for auto, entry in entries.items() if auto != "AutoConfig"}
        # A head that calls the layers otherwise may read no checkpoint of another head, merged or not.
        prefix = type(example(name).base).base_model_prefix
        apart = {auto for auto, kind in models.items() if _original(kind).base_model_prefix != prefix}
        assert {auto: made[auto] for auto in models.keys() - apart} == {
            auto: models[auto] for auto in models.keys() - apart
        }
        assert all(made[auto] == models[auto] or "has no module" in made[auto] for auto in apart), made


def _original(kind: str) -> type[PreTrainedModel]:
    return getattr(transformers, kind.removeprefix("MCSMoE"))


@pytest.mark.slow
def test_every_class_that_the_configuration_names_loads_without_the_package(tmp_path: Path) -> None:
    _check_heads(["mixtral"], tmp_path)


@pytest.mark.slow
def test_every_class_of_every_layout_loads_without_the_package(tmp_path: Path) -> None:
    _check_heads(ALL, tmp_path)
