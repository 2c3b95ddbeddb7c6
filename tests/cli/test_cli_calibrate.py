"""`hf-mcsmoe calibrate`: what a file of scores holds, what is added to it, and commands that then run no forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import Run
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_mcsmoe import MergeConfig, RoutingStatistics, collect_statistics
from hf_mcsmoe.cli.needs import needs_of_names
from hf_mcsmoe.methods.router_norm import CHANGE
from hf_mcsmoe.methods.statistics import STATISTICS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scores")


@pytest.fixture
def source(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    if not (folder / "moe").exists():
        for name, seed in (("moe", 0), ("other", 1)):
            build("mixtral", seed).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        build("mixtral").model.save_pretrained(folder / "headless")
        tokenizer.save_pretrained(folder / "headless")
        (folder / "text.txt").write_text("\n".join(f"what is {n} {m}" for n in range(6) for m in range(8)))
    return folder


def _given(source: Path, model: str = "moe") -> list[Any]:
    return [source / model, "--data", source / "text.txt", "--num-samples", 40, "--max-length", 8]


@contextmanager
def no_forward() -> Iterator[None]:
    """Fail where a model runs within the block."""

    def fail(module: Any, _: Any) -> None:
        if isinstance(module, PreTrainedModel):
            pytest.fail(f"{type(module).__name__} ran")

    handle = register_module_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def test_by_default_all_is_summed_that_takes_no_further_product(source: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "scores.safetensors"
    code, out, err = run("calibrate", *_given(source), "--output", file)
    assert code == 0, err
    held = RoutingStatistics.load(file)
    cheap = {name for name, method in STATISTICS.methods.items() if not method.products} - {"sample", CHANGE}
    assert all(set(sums) == cheap for sums in held.layers.values())
    assert "contribution" not in cheap
    for cost in ("runs each expert on its tokens", "a backward pass a batch", "a sample of 1,024 tokens a layer"):
        assert f"({cost})" in err
    few = [
        f"{expert} ({count})"
        for expert, count in enumerate(held["model.layers.0.mlp.experts"].counts.tolist())
        if count < 8
    ]
    assert not few or f"reached experts {few[0]}" in err
    assert "logit_gram" in out


@pytest.mark.filterwarnings("ignore:Few calibration tokens")
def test_sums_are_added_and_then_no_command_runs_a_forward_for_them(source: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "scores.safetensors"
    assert run("calibrate", *_given(source), "--output", file, "--methods", "msmoe")[0] == 0
    first = RoutingStatistics.load(file)
    experts = ["--experts", "0.5", "--repair", "none", "--scores", file]
    prune = ["--reduce", "prune", "--saliency", "reap"]
    code, _, err = run("compress", *_given(source), *experts, *prune, "--output", tmp_path / "none")
    assert code == 1
    assert "'contribution' was not collected" in err
    assert "`hf-mcsmoe calibrate MODEL --data ... --methods contribution --output FILE`" in err
    code, _, err = run("calibrate", *_given(source), "--output", file, "--methods", "contribution")
    assert code == 0, err
    both = RoutingStatistics.load(file)
    for layer, sums in both.layers.items():
        assert set(sums) == {*first[layer], "contribution"}
        assert all(sums[name].equal(value) for name, value in first[layer].items())
    with no_forward():
        code, _, err = run("calibrate", *_given(source), "--output", file, "--methods", "reap")
        assert code == 0
        assert "holds all of it already" in err
        for output, options in (("merged", []), ("pruned", prune)):
            code, _, err = run("compress", *_given(source), *experts, *options, "--output", tmp_path / output)
            assert code == 0, err


def test_what_cannot_be_collected_is_refused_before_weights_are_loaded(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_mcsmoe.cli.calibrate.load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    held = tmp_path / "held.safetensors"
    switch = build("switch_transformers")
    batch = {"input_ids": _ids(), "decoder_input_ids": _ids()}
    collect_statistics(switch, [batch], MergeConfig().needs).save(held)
    (tmp_path / "text").write_text("no scores")
    cases = {
        "a name": (
            "moe",
            ["--methods", "contributoin"],
            "Unknown method 'contributoin'. Did you mean 'contribution'?",
        ),
        "nothing": ("moe", ["--methods", ","], "names nothing"),
        "gradients": ("headless", ["--methods", "taylor"], "taylor reads gradients of a loss, and a MixtralModel has"),
        "no scores": ("moe", ["--output", tmp_path / "text"], "is damaged or no safetensors file"),
        "other layers": ("moe", ["--output", held], "was taken from another model"),
        "a folder": ("moe", ["--output", tmp_path], "is a folder: name a file"),
    }
    for model, options, message in cases.values():
        output = [] if "--output" in options else ["--output", tmp_path / "new.safetensors"]
        code, _, err = run("calibrate", *_given(source, model), *output, *options)
        assert code == 1
        assert message in err
        assert err.count("Error:") == 1
    assert not (tmp_path / "new.safetensors").exists()


def _ids() -> torch.Tensor:
    return torch.arange(2, 98).reshape(8, 12)


def test_a_preset_that_leaves_out_weights_names_what_its_score_reads() -> None:
    assert {"gated_inputs_squared", "gated_units_squared", "counts"} <= set(needs_of_names("moe-pruner"))
    assert {"output_sum", "output_squares", "gate_sum"} <= set(needs_of_names("mone"))


def test_sums_of_other_data_or_of_another_model_are_not_mixed(source: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "scores.safetensors"
    assert run("calibrate", *_given(source), "--output", file, "--methods", "gate")[0] == 0
    before = file.read_bytes()
    for methods in ("msmoe", "gate"):  # of which the file lacks sums, and has all
        code, _, err = run("calibrate", *_given(source), "--seed", 5, "--output", file, "--methods", methods)
        assert code == 1
        assert "taken from other data" in err
        code, _, err = run("calibrate", *_given(source, "other"), "--output", file, "--methods", methods)
        assert code == 1
        assert "taken from another model" in err
    assert file.read_bytes() == before
    code, _, err = run(
        "calibrate", *_given(source), "--seed", 5, "--output", file, "--methods", "msmoe", "--overwrite"
    )
    assert code == 0, err
    assert "gate_sum" not in RoutingStatistics.load(file)["model.layers.0.mlp.experts"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The repair left", "ignore:Few calibration tokens")
def test_curves_spare_plan_and_compress_their_measuring(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "scores.safetensors"
    code, _, err = run("calibrate", *_given(source), "--output", file, "--curves")
    assert code == 0, err
    monkeypatch.setattr("hf_mcsmoe.search.compress.measure_curves", lambda *a, **k: pytest.fail("measured again"))
    with no_forward():
        code, out, err = run("plan", source / "moe", "--scores", file)
    assert code == 0, err
    assert "chosen" in out
    code, _, err = run("compress", *_given(source), "--size", "0.6", "--scores", file, "--output", tmp_path / "out")
    assert code == 0, err
    streamed = tmp_path / "streamed.safetensors"
    code, _, err = run("calibrate", *_given(source), "--output", streamed, "--curves", "--stream")
    assert code == 0, err
    one, two = (RoutingStatistics.load(path) for path in (file, streamed))
    assert (one.curves, one.conditions) == (two.curves, two.conditions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", file.name, streamed.name]


@pytest.mark.slow
def test_a_folder_read_block_by_block_gives_the_same_file(source: Path, tmp_path: Path, run: Run) -> None:
    every = ",".join(name for name in STATISTICS if STATISTICS.find(name).from_data)
    files = [tmp_path / "memory.safetensors", tmp_path / "stream.safetensors"]
    for file, more in zip(files, ([], ["--stream"]), strict=True):
        code, _, err = run("calibrate", *_given(source), "--methods", every, "--output", file, *more)
        assert code == 0, err
    one, two = (RoutingStatistics.load(file) for file in files)
    assert (one.fingerprint, one.data, one.layers.keys()) == (two.fingerprint, two.data, two.layers.keys())
    for name, sums in one.layers.items():
        assert sums.keys() == two[name].keys() == {*every.split(","), "tokens"}
        assert all(two[name][key].equal(value) for key, value in sums.items())
