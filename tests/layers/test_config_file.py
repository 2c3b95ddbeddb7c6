"""A model's name and its config.json are looked over before anything is built, and the Hub is asked once."""

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from families import _tiny, build
from helpers import Run
from merged import run_python
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as omni

from hf_mcsmoe import moe_layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.loading import empty_model, load_config, load_model, load_tokenizer


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model."""
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    build("mixtral").save_pretrained(folder)
    return folder


def _changed(folder: Path, source: Path, **values: Any) -> Path:
    """Copy a model with other values in its config.json; None takes one out."""
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return folder


NO_OBJECT = {
    "empty": (b"", "is cut off or damaged"),
    "cut off": (b'{"model_type": "mix', "is cut off or damaged"),
    "a list": (b"[1]", "holds no object but list"),
    "a number": (b"5", "holds no object but int"),
    "null": (b"null", "holds no object but NoneType"),
    "no text": (b"\xff\xfe\x00", "is cut off or damaged"),
    "too deep": (b"[" * 100_000, "is cut off or damaged"),
    "nothing said": (b"{}", "names no model type"),
}


@pytest.mark.parametrize("case", NO_OBJECT)
def test_a_file_that_is_no_object_is_refused(case: str, tmp_path: Path, run: Run) -> None:
    content, message = NO_OBJECT[case]
    (tmp_path / "config.json").write_bytes(content)
    code, _, err = run("inspect", tmp_path)
    assert (code, err.count("Error:")) == (1, 1)
    assert message in err
    assert "download it again" in err


# Values that mean nothing, and words of the refusal.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "absent"}, "names no model type"),
    ({"model_type": 5}, "names no model type"),
    ({"model_type": ["mixtral"]}, "names no model type"),
    ({"model_type": "mixtrall"}, "(is 'mixtral' meant?)"),
    ({"model_type": "odd", "auto_map": {"AutoConfig": "code.Config"}}, "such code is never run"),
    ({"architectures": "absent"}, "names the architecture '(none)'"),
    ({"architectures": [1]}, "names the architecture 1"),
    ({"architectures": {"a": 1}}, "names the architecture {'a': 1}"),
    ({"architectures": ["MCSMoENothing"]}, "names the architecture 'MCSMoENothing'"),
    ({"architectures": ["MixtralConfig"]}, "names the architecture 'MixtralConfig'"),
    ({"hidden_size": "32"}, "makes no model"),
    ({"hidden_size": -1}, "makes no model"),
    ({"hidden_size": 0}, "makes no model"),
    ({"hidden_size": None}, "makes no model"),
    ({"hidden_act": "nothing"}, "makes no model"),
    ({"dtype": {}}, "makes no model"),
    ({"dtype": "float7"}, "makes no model"),
    ({"num_attention_heads": 0}, "makes no model"),
    ({"num_hidden_layers": 10**9}, "says num_hidden_layers=1000000000"),
    ({"num_hidden_layers": 0}, "has no Mixture-of-Experts layer"),
    ({"num_local_experts": 10**9}, "says num_local_experts=1000000000"),
    ({"num_local_experts": 0}, "has 0 experts"),
    ({"intermediate_size": 0}, "no size may be 0"),
    ({"num_experts_per_tok": 0}, "of which a token picks 0"),
    ({"num_experts_per_tok": -1}, "of which a token picks -1"),
    ({"num_experts_per_tok": 9}, "of which a token picks 9"),
    ({"num_experts_per_tok": "2"}, "makes no model"),
    ({"rope_parameters": 5}, "makes no model"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_value_that_means_nothing_is_refused(
    values: dict[str, Any], message: str, mixtral: Path, tmp_path: Path
) -> None:
    folder = _changed(tmp_path / "changed", mixtral, **values)
    with pytest.raises(ValueError) as error:  # noqa: PT011, the message is compared below
        moe_layers(empty_model(str(folder)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, -1])
def test_switch_without_experts_is_refused(value: int, tmp_path: Path) -> None:
    build("switch_transformers").save_pretrained(tmp_path / "switch")
    folder = _changed(tmp_path / "changed", tmp_path / "switch", num_experts=value)
    with pytest.raises(ValueError, match=r"has 0 experts|makes no model"):
        moe_layers(empty_model(str(folder)))


def test_names_that_are_none_are_refused_at_once(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mixtral.parent)
    cases = {
        "./mixtrl": r"is no folder with a model \(is mixtral meant\?\)",
        "mixtrl": r"neither such a folder \(is mixtral meant\?\)",
        "org/name/extra": "nor an id of the Hub",
        "https://hub/org/name": "nor an id of the Hub",
        "": "is no folder with a model",
        "a b": "nor an id of the Hub",
        "x" * 300: "is no name of a model",
        "a\0b": "nor an id of the Hub|is no name of a model",
        str(tmp_path): "holds no config.json",
        str(mixtral / "config.json"): "is a file: name the folder",
        "org/name": "HF_HUB_OFFLINE keeps the Hub out",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            load_config(name)


ASK = """
import sys, time
from hf_mcsmoe.layers.loading import load_config
for name in sys.argv[1:]:
    started = time.perf_counter()
    try:
        load_config(name)
    except ValueError as error:
        print(f"{time.perf_counter() - started:.2f} {error}")
"""


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        done = run_python(["-c", ASK, "modle", "org/name"], tmp_path, package=True, **environment)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert "Retry" not in done.stderr
    for line in lines:
        seconds, _, told = line.partition(" ")
        assert float(seconds) < 5, "asked again and again this takes 24 s"
        assert "nor a Hub that can be reached" in told


# Of PEFT itself, with this version of Transformers.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_folder_with_an_adapter_is_refused_and_the_advice_works(
    mixtral: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(mixtral), LoraConfig(target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(mixtral)
    adapted.save_pretrained(tmp_path / "adapter")
    beside = _changed(tmp_path / "beside", mixtral)
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", beside)
    for folder in (tmp_path / "adapter", beside):
        with pytest.raises(ValueError, match=r"holds an adapter .* merge_and_unload\(\)"):
            load_config(str(folder))
    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert len(moe_layers(empty_model(str(tmp_path / "merged")))) == 4


def test_of_a_class_without_a_forward_the_part_with_experts_is_named_and_loads(tmp_path: Path) -> None:
    kind = omni.Qwen3OmniMoeForConditionalGeneration
    kind(_tiny(kind.config_class())).save_pretrained(tmp_path / "whole")
    part = omni.Qwen3OmniMoeThinkerForConditionalGeneration
    with pytest.raises(
        ValueError, match=rf"no forward of its own .* with {part.__name__}\.from_pretrained\("
    ) as error:
        empty_model(str(tmp_path / "whole"))
    assert str(error.value).count("from_pretrained") == 1
    part.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "part")
    assert moe_layers(empty_model(str(tmp_path / "part")))


def test_code_beside_a_model_or_a_tokenizer_is_never_run_nor_asked_about(
    mixtral: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    entries = {f"Auto{name}": f"own.{name}" for name in ("Config", "Model", "ModelForCausalLM")}
    folder = _changed(tmp_path / "own", mixtral, auto_map=entries)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    for file in ("own.py", "generate.py", "custom_generate/generate.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("raise SystemExit('code was run')\n")
    assert type(load_model(str(folder))).__name__ == "MixtralForCausalLM"  # Transformers knows the type itself
    load_tokenizer(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | own))
    assert type(load_tokenizer(str(folder))).__module__.startswith("transformers.")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer that loads"):
        load_tokenizer(str(folder))


def _index(**values: Any) -> dict[str, Any]:
    return {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}} | values


# Whole contents of an index, and words of the refusal.
INDICES: list[tuple[Any, str]] = [
    ([1], "is cut off or damaged"),
    ({}, "its weight_map is no object"),
    (_index(weight_map=None), "its weight_map is no object"),
    (_index(weight_map=["a"]), "its weight_map is no object"),
    (_index(weight_map={}), "its weight_map is no object"),
    (_index(weight_map={"a": 5}), "its weight_map is no object"),
    (_index(weight_map={"a": "../other/model.safetensors"}), "names the shard '../other/model.safetensors'"),
    (_index(weight_map={"a": "/model.safetensors"}), "names the shard '/model.safetensors'"),
    (_index(weight_map={"a": "model.bin"}), "names the shard 'model.bin'"),
    (_index(weight_map={"a": ""}), "names the shard ''"),
]


@pytest.mark.parametrize(("content", "message"), INDICES, ids=lambda value: str(value)[-40:])
def test_an_index_that_is_damaged_or_leads_elsewhere_is_refused(
    content: Any, message: str, mixtral: Path, tmp_path: Path
) -> None:
    folder = _changed(tmp_path / "changed", mixtral)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    for read in (load_model, Folder):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            read(str(folder))
        assert "download it again" in str(error.value)


@pytest.mark.parametrize(
    "header", [b"", b"{", b"[1]", b'{"a": 5}', b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}']
)
def test_weights_that_are_cut_off_are_refused(header: bytes, mixtral: Path, tmp_path: Path) -> None:
    folder = _changed(tmp_path / "changed", mixtral)
    for content in (header, len(header).to_bytes(8, "little") + header, (10**15).to_bytes(8, "little") + header):
        (folder / "model.safetensors").write_bytes(content)
        for read in (load_model, Folder):
            with pytest.raises(ValueError, match="download it again"):
                read(str(folder))


@pytest.mark.parametrize("name", ["a/b/c", "a b", "--x", "x" * 100, "a/b.git", "", "http://hub/a"])
def test_a_repository_that_is_no_name_is_refused_before_anything_is_read(name: str, tmp_path: Path, run: Run) -> None:
    code, _, err = run("compress", "nowhere", "--data", "none", "--output", tmp_path / "out", f"--push-to-hub={name}")
    assert code == 1
    assert "is no name of a repository" in err


def test_a_repository_without_a_token_is_refused(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["compress", "nowhere", "--data", "none", "--output", tmp_path / "out", "--push-to-hub", "me/model"]
    monkeypatch.setattr("hf_mcsmoe.cli.options.get_token", lambda: None)
    code, _, err = run(*arguments)
    assert (code, "needs a token of the Hub: run `hf auth login` first" in err) == (1, True)
    monkeypatch.setattr("hf_mcsmoe.cli.options.get_token", lambda: "secret")
    assert "Found no model 'nowhere'" in run(*arguments)[2]
