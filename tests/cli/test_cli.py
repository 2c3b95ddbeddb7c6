"""The command line as a user types it, on folders on disk."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from helpers import Run, batches, costs_on_card
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM, PreTrainedTokenizerFast

from hf_mcsmoe import MergeConfig, cli, collect_statistics, merge_experts, plan_merge
from hf_mcsmoe.layers.loading import load_model

TEXT = "\n".join(f"what is {n} {m}" for n in range(10) for m in range(10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def source(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    path = folder / "mixtral"
    if not path.exists():
        build("mixtral").save_pretrained(path)
        tokenizer.save_pretrained(path)
        (folder / "text.txt").write_text(TEXT)
    return path


def test_inspect_shows_layers_and_savings(source: Path, run: Run) -> None:
    code, out, err = run("inspect", source, "--experts", "4")
    assert code == 0, err
    assert "MixtralForCausalLM" in out
    assert out.count("mlp.experts") == 4
    model = build("mixtral")
    held = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert f"parameters {model.num_parameters():,}, of them in experts {held:,}" in out
    assert f"parameters {model.num_parameters() - held // 2:,} " in out


def test_inspect_tells_a_compressed_model_whose_layers_are_all_whole(source: Path, tmp_path: Path, run: Run) -> None:
    model = load_model(str(source))
    statistics = collect_statistics(model, batches("mixtral", model, 1))
    merge_experts(model, plan_merge(model, statistics, MergeConfig(experts=1.0))).save_pretrained(tmp_path)
    code, out, err = run("inspect", tmp_path)
    assert code == 0, err
    assert "family mixtral, merged" in out


def test_compress_writes_a_folder_that_loads_and_statistics_that_are_reused(
    source: Path, tmp_path: Path, run: Run
) -> None:
    arguments = ["compress", source, "--data", source.parent / "text.txt", "--experts", "0.5", "--max-length", 8]
    arguments += ["--repair", "none"]
    statistics, output = tmp_path / "statistics.safetensors", tmp_path / "out"
    code, out, err = run(*arguments, "--output", output, "--scores", statistics)
    assert code == 0, err
    sizes = {row[0]: row[-3:] for row in (re.split("  +", line.strip()) for line in out.splitlines()) if len(row) > 3}
    rows = ["parameters", "bytes", "bytes on disk", "FLOPs per token", "of them in experts"]
    assert sizes.keys() >= set(rows)
    assert re.search(r"^ tokens/s +[\d,]+ +[\d,]+ *$", out, flags=re.MULTILINE)
    on_disk = [sum(file.stat().st_size for file in each.glob("*.safetensors")) for each in (source, output)]
    assert sizes["bytes on disk"] == [*(f"{size:,}" for size in on_disk), f"{1 - on_disk[1] / on_disk[0]:.1%}"]
    assert sizes["parameters"][0] == f"{build('mixtral').num_parameters():,}"
    card = (output / "README.md").read_text()
    for row in rows:
        assert f"| {row} | {' | '.join(sizes[row])} |" in card
    assert re.search(r"^\| tokens/s \| [\d,]+ \| [\d,]+ \|  \|$", card, flags=re.MULTILINE)
    names = {file.name for file in output.iterdir()}
    assert {"config.json", "README.md", "mcsmoe_plan.json", "tokenizer.json", "modeling_mcsmoe.py"} <= names
    assert "<svg" in (output / "report.html").read_text(encoding="utf-8")
    code, out, err = run(*arguments, "--output", tmp_path / "again", "--scores", statistics)
    assert code == 0, err
    assert "statistics read from" in err
    assert "FLOPs" not in out, "there is no batch to count them on"
    plans = [json.loads((tmp_path / name / "mcsmoe_plan.json").read_text())["layers"] for name in ("out", "again")]
    assert plans[0] == plans[1]
    code, out, err = run("inspect", output)
    assert code == 0, err
    assert "family mixtral, merged" in out
    code, out, err = run("compress", output, "--data", source.parent / "text.txt", "--output", tmp_path / "twice")
    assert code == 1
    assert "compressed already" in err
    assert not (tmp_path / "twice").exists()


def test_compress_shows_the_original_the_merged_and_the_compressed_model(
    source: Path, tmp_path: Path, run: Run
) -> None:
    arguments = ["compress", source, "--data", source.parent / "text.txt", "--max-length", 8, "--experts", 0.5]
    arguments += ["--repair", "none"]
    for name, more in (("merged", []), ("small", ["--rank", 2, "--keep", 0.25])):
        code, out, err = run(*arguments, "--output", tmp_path / name, *more)
        assert code == 0, err
    printed = {row[0]: row[1:] for row in (re.split("  +", line.strip()) for line in out.splitlines())}
    card = costs_on_card((tmp_path / "small" / "README.md").read_text())
    assert card.pop("") == ["before", "merged", "compressed", "saved"]
    assert {row: [cell for cell in cells if cell] for row, cells in card.items()} == {
        row: printed[row] for row in card
    }
    models = [load_model(str(path)) for path in (source, tmp_path / "merged", tmp_path / "small")]
    assert card["parameters"][:3] == [f"{model.num_parameters():,}" for model in models]
    on_disk = [
        (path / "model.safetensors").stat().st_size for path in (source, tmp_path / "merged", tmp_path / "small")
    ]
    told = [int(cell.replace(",", "")) for cell in card["bytes on disk"][:3]]
    assert [told[0], told[2]] == [on_disk[0], on_disk[2]]
    assert told[1] == pytest.approx(on_disk[1], rel=0.02)
    merged = costs_on_card((tmp_path / "merged" / "README.md").read_text())
    for row in ("FLOPs per token", "of them in experts"):
        counts = [[int(cell.replace(",", "")) for cell in cells[:2]] for cells in (card[row], merged[row])]
        assert counts[0] == pytest.approx(counts[1], rel=0.02), "but for picks that meet, before and after a repair"
        assert int(card[row][2].replace(",", "")) < int(card[row][1].replace(",", ""))
    assert all(int(cell.replace(",", "")) > 0 for cell in card["tokens/s"][:3])


WRONG = {
    "no such model": (["nowhere/such-model"], "Found no model 'nowhere/such-model'"),
    "no such folder": (["./nowhere"], "is no folder with a model"),
    "no such data": (["{model}", "--data", "missing.txt"], "no file missing.txt"),
    "experts": (["{model}", "--experts", "many"], "neither a whole number"),
    "too many experts": (["{model}", "--experts", "9"], "more than the 8 experts"),
    "share": (["{model}", "--experts", "1.5"], "a share in (0, 1]"),
    "method": (["{model}", "--similarity", "router_logit"], "Did you mean 'router_logits'?"),
    "pattern": (["{model}", "--skip", "encoder.*"], "matches no layer"),
    "dtype": (["{model}", "--dtype", "float7"], "no floating-point dtype"),
    "nothing to repair": (["{model}", "--experts", "1.0", "--repair", "refit"], "has nothing to do"),
    "keep without rank": (["{model}", "--keep", "7"], "give --rank as well"),
    "called otherwise": (["{model}", "--statistics=sums"], "--statistics is called --scores now"),
    "not empty": (["{model}", "--output", "{model}/.."], "is not empty"),
    "the model": (["{model}", "--output", "{model}", "--overwrite"], "is the folder of the model, which is to stay"),
    "in the model": (["{model}", "--output", "{model}/a/b"], "lies in the folder of the model"),
    "in the data": (
        ["{model}", "--data", "{model}/..", "--output", "{model}/../out"],
        "lies in the folder of the data",
    ),
    "long name": (["{model}", "--output", "a" * 256], "cannot be written (File name too long)"),
    "no UTF-8": (["{model}", "--output", "caf\udce9"], "is no UTF-8"),
    "a file": (["{model}", "--output", "{text}"], "is a file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_sentence_and_leave_nothing(
    case: str, source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = source.parent / "text.txt"
    arguments, message = WRONG[case]
    given = [str(argument).format(model=source, text=text) for argument in arguments]
    given += [] if "--data" in given else ["--data", str(text)]
    given += [] if "--experts" in given else ["--experts", "0.5"]
    given += [] if "--output" in given else ["--output", str(tmp_path / "out")]
    loaded: list[str] = []
    monkeypatch.setattr("hf_mcsmoe.cli.compress.load_model", lambda name, **options: loaded.append(name))
    code, _, err = run("compress", *given)
    assert code == 1
    assert not loaded
    assert message in err
    assert err.count("Error:") == 1
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("sys.argv", ["hf-mcsmoe", "--debug", "compress", *given])
    with pytest.raises(ValueError, match=re.escape(message[:15])):
        cli.main()


UNREADABLE = {
    "folder": "is a folder: name a file",
    "text": "is damaged or no safetensors file",
    "layers": "was taken from another model: it holds the layers model.other",
    "sum": "'gate_sum' was not collected",
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_file_of_statistics_is_read_before_weights_are(
    case: str, source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, text = tmp_path / "statistics", source.parent / "text.txt"
    if case == "folder":
        file.mkdir()
    elif case == "text":
        file.write_text("counts: 1, 2, 3")
    else:
        model = build("mixtral")
        statistics = collect_statistics(model, batches("mixtral", model, 1), ["counts", "logit_gram"])
        if case == "layers":
            statistics.layers["model.other"] = statistics.layers.pop(next(iter(statistics.layers)))
            statistics.layers = dict(reversed(statistics.layers.items()))
        statistics.save(file)
    monkeypatch.setattr(
        "hf_mcsmoe.cli.compress.load_model", lambda name, **options: pytest.fail("weights were loaded")
    )
    options = ["--data", text, "--output", tmp_path / "out", "--scores", file]
    options += ["--experts", "0.5"]
    code, _, err = run("compress", source, *options, *(["--saliency", "gate"] if case == "sum" else []))
    assert code == 1
    assert UNREADABLE[case] in err
    assert err.count("Error:") == 1


def test_a_full_disk_is_told_before_any_work(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    code, _, err = run("compress", source, "--data", source.parent / "text.txt", "--output", tmp_path / "out")
    assert code == 1
    assert "GB free" in err
    assert not (tmp_path / "out").exists()


def test_a_dense_model_a_damaged_and_an_incomplete_one_are_refused(source: Path, tmp_path: Path, run: Run) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path / "dense")
    damaged = shutil.copytree(source, tmp_path / "damaged")
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    lacking = build("mixtral")
    incomplete = shutil.copytree(source, tmp_path / "incomplete")
    state = {name: tensor for name, tensor in lacking.state_dict().items() if "layers.2.mlp.experts" not in name}
    lacking.save_pretrained(incomplete, state_dict=state, save_original_format=False)
    messages = {"dense": "no Mixture-of-Experts layer", "damaged": "Cannot load", "incomplete": "lacks 2 of the model"}
    for name, message in messages.items():
        options = ["--data", source.parent / "text.txt", "--output", tmp_path / "out", "--size", "0.9"]
        code, _, err = run("compress", tmp_path / name, *options)
        assert code == 1
        assert message in err, name
        assert not (tmp_path / "out").exists()


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_too_little_memory_is_told_from_a_damaged_file(
    error: Exception, source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr(MixtralForCausalLM, "from_pretrained", fail)
    code, _, err = run("compress", source, "--data", source.parent / "text.txt", "--output", tmp_path / "out")
    assert code == 1
    assert f"too little memory for {source}" in err
    assert "--device-map auto" in err
    assert "damaged" not in err


def test_a_quantized_model_is_refused_before_its_weights_are_loaded(source: Path, tmp_path: Path, run: Run) -> None:
    quantized = shutil.copytree(source, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    (quantized / "model.safetensors").unlink()
    options = ["--data", source.parent / "text.txt", "--output", tmp_path / "out"]
    for arguments in (["inspect", quantized], ["compress", quantized, *options]):
        code, _, err = run(*arguments)
        assert code == 1
        assert "is quantized (mxfp4)" in err


def test_a_source_in_another_format_has_no_bytes_to_compare(source: Path, tmp_path: Path, run: Run) -> None:
    old = shutil.copytree(source, tmp_path / "old")
    (old / "model.safetensors").unlink()
    torch.save(build("mixtral").state_dict(), old / "pytorch_model.bin")
    data = ["--data", source.parent / "text.txt", "--max-length", 8, "--experts", 0.5, "--repair", "none"]
    code, out, err = run("compress", old, *data, "--output", tmp_path / "out")
    assert code == 0, err
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert re.search(rf"bytes on disk +{size:,}\s", out)


def test_the_demos_output_is_checked_before_it_runs(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path | None] = []
    monkeypatch.setattr("hf_mcsmoe.demo.compare", lambda experts, output: written.append(output) or "table")
    for output, message in ((source, "pass --overwrite"), (source.parent / "text.txt", "is a file")):
        code, _, err = run("demo", "--output", output)
        assert code == 1
        assert message in err
    assert not written
    for arguments in (["--output", source, "--overwrite"], ["--output", tmp_path / "new"], []):
        assert run("demo", *arguments)[0] == 0
    assert written == [source, tmp_path / "new", None]


def test_interrupted_in_the_middle_nothing_is_left(source: Path, tmp_path: Path) -> None:
    many = tmp_path / "many.txt"
    many.write_text(TEXT * 50)
    options = ["--data", many, "--num-samples", "5000", "--batch-size", "1", "--output", tmp_path / "out"]
    options += ["--experts", "0.5"]
    command = [sys.executable, "-m", "hf_mcsmoe.cli", "compress", *map(str, [source, *options])]
    # A run in the background of a script is born deaf to the signal.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=hear, **streams) as process:
        # Said once the model is loaded and the text read, so that the many forwards of the statistics begin.
        said = next((line for line in process.stderr if line.startswith("calibration on")), "")
        threading.Event().wait(1)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=120)
    assert said
    assert process.returncode == 130, rest
    assert [file.name for file in tmp_path.iterdir()] == ["many.txt"]


def test_help_explains_every_option(run: Run) -> None:
    code, out, _ = run("compress", "--help")
    assert code == 0
    for option in ("--experts", "--budget", "--skip", "--similarity", "--alignment", "--overwrite"):
        assert option in out
    code, out, _ = run("--help")
    assert code == 0
    assert "--debug" in out
    assert "M-SMoE" in out
