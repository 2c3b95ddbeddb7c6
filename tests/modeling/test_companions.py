"""What lies beside the source's weights lies beside the result's: both tokenize, template and process alike."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import logits
from hub import running_hub
from merged import example, merge, run_python, tokenizer
from transformers import AutoModelForCausalLM, Qwen2Tokenizer

from hf_mcsmoe.modeling.companions_mcsmoe import remember_source

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizers"
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
TEXT = "w5 w6 hello wörld"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, with nothing beside the weights."""
    folder = tmp_path_factory.mktemp("base") / "model"
    example("mixtral").base.save_pretrained(folder)
    return folder


def _words(folder: Path) -> None:
    tokenizer().save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _templates(folder: Path) -> None:
    tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text(f"tools {TEMPLATE}")


def _tekken(folder: Path) -> None:
    """Mistral's own format: one file that holds all of it."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"he", b"ll", b"hell", b" w", b"or"]
    ranks = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(tokens)
    ]
    special = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(["<unk>", "<s>"])]
    sizes = {"num_vocab_tokens": 261, "default_vocab_size": 263, "default_num_special_tokens": 2, "version": "v3"}
    content = {
        "config": {"pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+", **sizes},
        "vocab": ranks,
        "special_tokens": special,
    }
    (folder / "tekken.json").write_text(json.dumps(content))


def _pair_of_files(folder: Path) -> None:
    """Qwen's: a vocabulary and merges, no tokenizer.json, and settings that name the class."""
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz5Ġ")}
    made = Qwen2Tokenizer(vocab={**letters, "he": 28, "<|endoftext|>": 29}, merges=[("h", "e")])
    made.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    _call(folder, "qwen3_moe")


def _call(folder: Path, family: str) -> None:
    """Let a source be of the family whose tokenizer this is, by which Transformers chooses the class."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": family}))


def _code(folder: Path) -> None:
    """A class of its own, which reads a file that no list of names would know."""
    (folder / "tokenization_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "from tokenizers import Tokenizer, models, pre_tokenizers\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n"
        "    vocab_files_names = {'words_file': 'words.own'}\n"
        "    def __init__(self, words_file=None, **kwargs):\n"
        "        words = Path(words_file).read_text().split()\n"
        "        made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='?'))\n"
        "        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()\n"
        "        super().__init__(tokenizer_object=made, unk_token='?', **kwargs)\n"
    )
    (folder / "words.own").write_text("? w6 hello w5")
    auto = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto, "tokenizer_class": "OwnTokenizer"}))


def _copied(name: str, family: str) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        for file in (DATA / name).iterdir():
            shutil.copy(file, folder)
        _call(folder, family)

    return copy


def _processor(folder: Path) -> None:
    """Settings that name no class: Transformers takes that of the family."""
    _words(folder)
    (folder / "preprocessor_config.json").write_text('{"feature_size": 40}')
    _call(folder, "whisper")


FORMS: dict[str, Callable[[Path], None]] = {
    "words": _words,
    "templates": _templates,
    "tekken": _tekken,
    "pair of files": _pair_of_files,
    "code": _code,
    "processor": _processor,
}
REAL = {name: _copied(name, family) for name, family in (("olmoe", "olmoe"), ("t5", "switch_transformers"))}
# Tokenizes and templates in a process of its own, without this package, by what lies in each folder.
USE = """
import json, os, sys, transformers
found = {}
for folder in sys.argv[2:]:
    made = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    messages = [{"role": "user", "content": sys.argv[1]}]
    templates = made.chat_template if isinstance(made.chat_template, dict) else {"default": made.chat_template}
    chats = [made.apply_chat_template(messages, tokenize=False, chat_template=name) for name in templates if name]
    found[folder] = [type(made).__name__, made(sys.argv[1]).input_ids, chats if made.chat_template else []]
    if os.path.exists(f"{folder}/preprocessor_config.json"):
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        found[folder] += [type(processor).__name__, processor.feature_extractor.to_dict()]
print(json.dumps(found))
"""


def _check_forms(forms: dict[str, Callable[[Path], None]], base: Path, tmp_path: Path) -> None:
    merged = example("mixtral").merged
    pairs = []
    for name, make in forms.items():
        source = shutil.copytree(base, tmp_path / "sources" / name)
        make(source)
        remember_source(merged, str(source))
        try:
            merged.save_pretrained(tmp_path / "results" / name)
        finally:
            merged.mcsmoe_source = None
        pairs.append((source, tmp_path / "results" / name))
    done = run_python(["-c", USE, TEXT, *(str(path) for pair in pairs for path in pair)], tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for source, result in pairs:
        assert found[str(source)] == found[str(result)], source.name
        assert found[str(source)][1], source.name


@pytest.mark.slow
def test_source_and_result_tokenize_and_template_alike(base: Path, tmp_path: Path) -> None:
    _check_forms(FORMS, base, tmp_path)


@pytest.mark.slow
def test_so_they_do_with_the_tokenizers_of_real_models(base: Path, tmp_path: Path) -> None:
    _check_forms(REAL, base, tmp_path)


# What lies in a source, and whether it goes along.
BESIDE = {
    **dict.fromkeys(["LICENSE", "license.txt", "USE_POLICY.md", "words.own", "bpe.codes", "tokenizer.model.v3"], True),
    **dict.fromkeys(["tekken.json", "spiece.model", "source.spm", "emoji.json", "preprocessor_config.json"], True),
    **dict.fromkeys(["video_preprocessor_config.json", "chat_template.json", "processing_own.py"], True),
    **dict.fromkeys(["additional_chat_templates/tools.jinja", "tokenizer/tokenizer.json", "tokenizer/words"], True),
    **dict.fromkeys(["custom_generate/generate.py", "assets/picture.png", "notes/mine.txt"], False),
    **dict.fromkeys(
        ["pytorch_model.bin", "model.gguf", "flax_model.msgpack", "tf_model.h5", "consolidated.00.pth"], False
    ),
    **dict.fromkeys(["onnx/model.onnx", "onnx/tokenizer.json", "original/params.json", "params.json"], False),
    **dict.fromkeys(
        [".gitattributes", ".git/config", ".env", "train.log", "data.jsonl", "rows.csv", "NOTES.md"], False
    ),
    **dict.fromkeys(["adapter_config.json", "adapter_model.safetensors", "hf_quant_config.json"], False),
    **dict.fromkeys(["modeling_own.py", "pytorch_model.bin.index.json", "trainer_state.json", "optimizer.pt"], False),
    **dict.fromkeys(["checkpoint-5/model.safetensors", "checkpoint-5/tokenizer.json"], False),
}


def test_all_goes_along_but_weights_histories_and_code_of_models(base: Path, tmp_path: Path) -> None:
    source = shutil.copytree(base, tmp_path / "source")
    for name in BESIDE:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    merged = example("mixtral").merged
    remember_source(merged, str(source))
    merged.save_pretrained(tmp_path / "result")
    merged.mcsmoe_source = None
    assert {name for name in BESIDE if (tmp_path / "result" / name).exists()} == {
        name for name, goes in BESIDE.items() if goes
    }
    assert all((tmp_path / "result" / name).read_text() == name for name, goes in BESIDE.items() if goes)


def test_what_is_lacking_is_told(base: Path, tmp_path: Path) -> None:
    source = shutil.copytree(base, tmp_path / "source")
    _, merged = merge(AutoModelForCausalLM.from_pretrained(source), "mixtral")
    with pytest.warns(UserWarning, match=f"No tokenizer lies beside the weights of {source}"):
        merged.save_pretrained(tmp_path / "without")
    tokenizer().save_pretrained(tmp_path / "own")
    merged.save_pretrained(tmp_path / "own")
    merged.save_pretrained(tmp_path / "given", tokenizer=tokenizer())
    shutil.rmtree(source)
    with pytest.warns(UserWarning, match="is not to be found here, so it is saved without the tokenizer"):
        merged.save_pretrained(tmp_path / "gone")


def test_a_tokenizer_that_is_given_takes_the_place_of_the_sources(base: Path, tmp_path: Path) -> None:
    source = shutil.copytree(base, tmp_path / "source")
    _templates(source)
    _tekken(source)
    merged = example("mixtral").merged
    remember_source(merged, str(source))
    merged.save_pretrained(tmp_path / "result", tokenizer=tokenizer())
    merged.mcsmoe_source = None
    names = {file.name for file in (tmp_path / "result").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert not names & {"tekken.json", "chat_template.jinja", "additional_chat_templates"}


def test_an_older_models_tokenizer_does_not_stay_beside_a_new_ones(base: Path, tmp_path: Path) -> None:
    merged, kinds = example("mixtral").merged, {"old": _templates, "new": _tekken}
    for name, make in kinds.items():
        source = shutil.copytree(base, tmp_path / name)
        make(source)
        remember_source(merged, str(source))
        merged.save_pretrained(tmp_path / "result")
        (tmp_path / "result" / "notes.txt").write_text("mine")
    merged.mcsmoe_source = None
    names = {file.name for file in (tmp_path / "result").iterdir()}
    assert {"tekken.json", "notes.txt"} <= names
    assert not names & {"tokenizer.json", "chat_template.jinja", "additional_chat_templates"}


@pytest.mark.parametrize("again", [False, True], ids=["merged", "loaded"])
def test_a_subfolder_and_a_relative_path_are_remembered(
    again: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merged model, or one loaded from a saved one, is saved where the process has gone to meanwhile."""
    case = example("mixtral")
    for name, vocabulary in (("root/mine", _templates), ("root/other", _words)):
        source = shutil.copytree(base, tmp_path / name)
        vocabulary(source)
    other = json.loads((tmp_path / "root" / "other" / "config.json").read_text())
    (tmp_path / "root" / "other" / "config.json").write_text(json.dumps(other | {"rms_norm_eps": 0.5}))
    monkeypatch.chdir(tmp_path)
    _, model = merge(AutoModelForCausalLM.from_pretrained("root", subfolder="mine"), "mixtral")
    if again:
        model.save_pretrained("results/first")
        model = AutoModelForCausalLM.from_pretrained("results", subfolder="first")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.save_pretrained("result")
    assert (tmp_path / "elsewhere" / "result" / "additional_chat_templates" / "tools.jinja").is_file()
    loaded = AutoModelForCausalLM.from_pretrained("result")
    assert logits(loaded, case.batch).equal(logits(model, case.batch))


@pytest.mark.slow
def test_all_comes_along_from_the_hub(base: Path, tmp_path: Path) -> None:
    source = shutil.copytree(base, tmp_path / "source")
    _templates(source)
    (source / "pytorch_model.bin").write_bytes(b"old")
    files = {str(file.relative_to(source)): file.read_bytes() for file in source.rglob("*") if file.is_file()}
    code = (
        "import sys, hf_mcsmoe\n"
        "from transformers import AutoModelForCausalLM\n"
        "from merged import merge\n"
        "merge(AutoModelForCausalLM.from_pretrained('me/model'), 'mixtral')[1].save_pretrained(sys.argv[1])\n"
    )
    with running_hub() as hub:
        hub.files["me/model"] = files
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        done = run_python(["-c", code, str(tmp_path / "result")], tmp_path, package=True, **environment)
    assert done.returncode == 0, done.stderr
    for name in ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"):
        assert (tmp_path / "result" / name).read_bytes() == files[name]
    assert not list((tmp_path / "home").rglob("pytorch_model.bin"))
