"""Saved variants in a process without the package, and what is refused of their folders."""

import json
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import accelerate
import pytest
import torch
from families import build
from helpers import logits
from hub import running_hub
from huggingface_hub import HfApi, constants
from merged import check_without_package, run_python
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from variant_folders import dense, fairseq, save, tokens, xglm

from hf_mcsmoe.modeling import modeling_mcsmoe
from hf_mcsmoe.variants import (
    add_attention_routing,
    add_momentum,
    add_similarity_routing,
    mix_precision,
    moefy_dense,
    momentum_mcsmoe,
    soft_merge,
    swap_peer,
    upcycle_dense,
)


def _eager() -> PreTrainedModel:
    model = build("mixtral")
    model.set_attn_implementation("eager")
    return model


def _upcycled(attention: str) -> PreTrainedModel:
    return upcycle_dense([dense(0), dense(1)], "mixtral", attention=attention)


def _peer(model: PreTrainedModel) -> PreTrainedModel:
    return swap_peer(model, num_experts=36, heads=3, top_k=4, key_size=8)


# A variant and the model that it is made of.
CASES: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[PreTrainedModel], PreTrainedModel]]] = {
    "momentum": (lambda: build("mixtral"), lambda model: add_momentum(model, 0.6, 0.9)),
    "momentum_seq2seq": (lambda: build("switch_transformers"), lambda model: add_momentum(model, 0.6, kind="adam")),
    "lory": (lambda: build("mixtral"), lambda model: soft_merge(model, segment_length=4)),
    "smoe_dropout": (dense, lambda model: moefy_dense(model, 4, top_k=2)),
    "peer": (dense, _peer),
    "fairseq_moe": (xglm, fairseq),
    "mixed_precision": (lambda: build("mixtral"), lambda model: mix_precision(model, t1=0.5, bits=4, group_size=8)),
    "similarity_routing": (lambda: build("mixtral"), add_similarity_routing),
    "attention_routing": (_eager, add_attention_routing),
    "attention_mixture": (lambda: _upcycled("average"), lambda model: _upcycled("mixture")),
    "shared_kv": (lambda: _upcycled("average"), lambda model: _upcycled("shared_kv")),
}
LOADING = [
    *("loads", "saves_again", "keeps_bfloat16", "builds_from_its_configuration", "loads_by_device_map"),
    *("loads_offloaded_to_disk_and_saves", "generates", "copies_deeply", "pickles", "compiles"),
    *("checkpoints_gradients", "runs_every_experts_implementation", "works_in_a_pipeline"),
    "loads_as_the_base_model_and_with_a_new_head",
]
TRAINING = ["trains_saves_and_resumes", "takes_lora"]
# What a variant does not do: which experts are rounded is decided by their weights, where a graph ends; fairseq's
# base, XGLM, has no other heads; and PEER's neurons are not computed by the library's implementations.
LACKING = {
    "mixed_precision": {"compiles"},
    "fairseq_moe": {"loads_as_the_base_model_and_with_a_new_head"},
    "peer": {"runs_every_experts_implementation"},
}
# What fails of Switch itself: its loop over experts compiles to no graph, and its experts are no stacked matrices.
SEQ2SEQ = ["loads", "saves_again", "keeps_bfloat16", "loads_by_device_map", "generates", "copies_deeply", "pickles"]


@pytest.mark.slow
def test_a_process_without_the_package_loads_uses_and_trains_them(tmp_path: Path) -> None:
    loading, training = {}, {}
    for name, (base, change) in CASES.items():
        is_seq2seq = name.endswith("seq2seq")
        auto_class = "AutoModelForSeq2SeqLM" if is_seq2seq else "AutoModelForCausalLM"
        folder = save(change(base()), base(), tmp_path / name, auto_class=auto_class)
        able = [check for check in LOADING if check not in LACKING.get(name, ())]
        loading[folder] = SEQ2SEQ if is_seq2seq else able
        training[folder] = TRAINING[:1] if is_seq2seq else TRAINING
    for checks, script in ((loading, "without_package.py"), (training, "train_without_package.py")):
        for name, report in check_without_package(checks, tmp_path, script).items():
            assert not any(report.values()), "\n".join([name, *report.values()])


def test_a_folder_has_the_code_that_its_variant_imports_and_no_other(tmp_path: Path) -> None:
    add_momentum(build("mixtral")).save_pretrained(tmp_path)
    names = {file.name for file in tmp_path.glob("*.py")}
    shared = {"remote_mcsmoe.py", "companions_mcsmoe.py", "configuration_mcsmoe.py", "folders_mcsmoe.py"}
    assert names == {"momentum_mcsmoe.py", "stacks_mcsmoe.py", "generated_mcsmoe.py", *shared}
    assert not any(
        "hf_mcsmoe." in file.read_text() for file in tmp_path.glob("*.py") if "import hf" in file.read_text()
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["variant"]["name"] == "momentum"
    assert config["base_model_type"] == "mixtral"


def test_with_the_package_it_loads_without_the_flag(tmp_path: Path) -> None:
    for name, change in (("momentum", add_momentum), ("smoe_dropout", lambda model: moefy_dense(model, 4))):
        model = change(build("mixtral") if name == "momentum" else dense())
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(loaded) is type(model)
        assert torch.equal(logits(loaded, tokens(model)), logits(model, tokens(model)))


def test_names_that_lead_to_no_class_are_no_attributes() -> None:
    for module, prefix in ((momentum_mcsmoe, "Momentum"), (modeling_mcsmoe, "MCSMoE")):
        for name in (
            "Other",
            f"{prefix}Nothing",
            f"{prefix}Nothing__mixtral__modeling_mixtral",
            f"{prefix}A__nothing",
        ):
            assert not hasattr(module, name), name


@pytest.mark.slow
def test_without_the_package_and_the_flag_loading_says_what_is_lacking(tmp_path: Path) -> None:
    add_momentum(build("mixtral")).save_pretrained(tmp_path / "model")
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({str(tmp_path / 'model')!r})"
    done = run_python(["-c", code], tmp_path)
    assert done.returncode == 1
    assert "trust_remote_code=True" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "no variant": ({"variant": None}, "must hold `name` and `options`, not None"),
        "family": ({"base_model_type": "none"}, "knows no model type 'none'"),
        "name": ({"variant": {"name": "none", "options": {}}}, "no variant 'none'"),
    }.values(),
)
def test_an_edited_configuration_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    add_momentum(build("mixtral")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_the_original_folder_is_not_overwritten(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    model = add_momentum(AutoModelForCausalLM.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="holds the original model"):
        model.save_pretrained(tmp_path)


CHANGES: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[PreTrainedModel], PreTrainedModel]]] = {
    "momentum": (lambda: build("mixtral"), add_momentum),
    "lory": (lambda: build("mixtral"), soft_merge),
    "mixed_precision": (lambda: build("mixtral"), lambda model: mix_precision(model, group_size=8)),
    "smoe_dropout": (dense, lambda model: moefy_dense(model, 4)),
    "peer": (dense, _peer),
    "similarity_routing": (lambda: build("mixtral"), add_similarity_routing),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_on_several_devices_or_on_none_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    make, change = CHANGES[name]
    make().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places["lm_head"] = "cpu"
    dispatched = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=tmp_path / "offload"
    )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(make().config)
    for model in (dispatched, accelerate.cpu_offload(make()), empty):
        cls, config = type(model), model.config.to_dict()
        with pytest.raises(ValueError, match="load it without device_map, change it, save it"):
            change(model)
        assert (type(model), model.config.to_dict()) == (cls, config)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_one_model_leaves_another_of_its_configuration_alone(name: str) -> None:
    make, change = CHANGES[name]
    model = make()
    other = type(model)(model.config)
    before = other.config.to_dict()
    assert model.config is other.config
    change(model)
    assert (other.config.to_dict(), type(other.config)) == (before, type(make().config))
    configs = {id(module.config) for module in model.modules() if isinstance(module, PreTrainedModel)}
    assert configs == {id(model.config)}


def test_what_is_pushed_goes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = add_momentum(build("mixtral"))
    with running_hub() as served:
        for name, value in (("ENDPOINT", served.endpoint), ("HF_HUB_OFFLINE", False)):
            monkeypatch.setattr(constants, name, value)
        tokens_seen: list[str | None] = []
        made = HfApi.create_repo
        monkeypatch.setattr(HfApi, "create_repo", lambda api, *args, **kwargs: (
            tokens_seen.append(api.token), made(api, *args, **kwargs))[1])  # fmt: skip
        monkeypatch.setattr(HfApi, "__init__", partialmethod(HfApi.__init__, endpoint=served.endpoint))
        (tmp_path / "saved").mkdir()
        (tmp_path / "saved" / "notes.txt").write_text("mine")
        options = {"repo_id": "me/variant", "private": True, "token": "secret", "revision": "trial"}
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, commit_message="a trial", **options)
    assert [request["visibility"] for request in served.created] == ["private"]
    assert tokens_seen == ["secret"]
    assert served.branches == ["me/variant@trial"]
    assert [commit["summary"] for commit in served.commits] == ["a trial"]
    names = set(served.files["me/variant"])
    assert {"config.json", "model.safetensors", "momentum_mcsmoe.py", "remote_mcsmoe.py"} <= names
    assert "notes.txt" not in names
