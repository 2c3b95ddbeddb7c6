"""`hf-mcsmoe plan`: sizes without data, and with what choices cost from a file, before anything is written."""

import json
import re
from pathlib import Path

import pytest
from families import build
from helpers import Run, batches
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe import MergeConfig, collect_statistics
from hf_mcsmoe.calibration.curves import LayerCurves, Part
from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.methods.choice import Grid
from hf_mcsmoe.search.conditions import conditions
from hf_mcsmoe.search.config import JOINT, SizeConfig

DENSE = '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1}'
CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def _share(text: str, method: str) -> float:
    """Return the share of the source that a line of the table tells."""
    line = next(line for line in text.splitlines() if method in line)
    return float(re.search(r"\b[01]\.\d{3}\b", line)[0])


def test_plan_tells_sizes_and_with_curves_what_they_cost(tmp_path: Path, run: Run) -> None:
    model, folder, scores = build("qwen3_moe"), tmp_path / "model", tmp_path / "scores.safetensors"
    model.save_pretrained(folder)
    code, out, _ = run("plan", str(folder))
    assert code == 0
    assert "all experts at 4 bits" in out
    assert "50% of the experts, pruned" in out
    code, half, _ = run("plan", str(folder), "--dtype", "bfloat16")
    assert code == 0
    sizes = [_share(text, "50% of the experts, pruned") for text in (out, half)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.1), "the file is float32"
    statistics = collect_statistics(model, batches("qwen3_moe", model))
    statistics.save(scores)
    code, _, error = run("plan", str(folder), "--scores", str(scores))
    assert code == 1
    assert "not what choices cost" in error
    code, out, error = run("plan", str(folder), "--scores", str(scores), "--experts", "4")
    assert code == 0, error
    assert "no KL is predicted" in error
    assert "with --experts 4: " in out
    assert ", KL" not in out
    for name, sums in statistics.layers.items():
        experts = len(sums.counts)
        parts = {Grid(bits, size): Part(4.0**-bits, 4.0**-bits) for bits in (8, 4, 3, 2) for size in range(1, 129)}
        reduced = {count: Part(1 / count, 1 / count) for count in range(1, experts)}
        low_rank = {rank: dict.fromkeys((0, 8, 4, 3, 2), Part(2.0, 2.0)) for rank in range(1, 65)}
        statistics.curves[name] = LayerCurves(experts, {"merge": reduced}, parts, parts, low_rank)
    statistics.save(scores)
    code, _, error = run("plan", str(folder), "--scores", str(scores))
    assert code == 1
    assert "What choices cost was measured with bits None" in error, "nobody knows how it was"
    statistics.conditions = conditions(MergeConfig(), SizeConfig(), JOINT)
    statistics.save(scores)
    code, out, error = run("plan", str(folder), "--scores", str(scores))
    assert code == 0, error
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("chosen")]
    effects = [float(row[-1]) for row in rows]
    assert len(rows) > 1
    assert effects == sorted(effects)
    safe = [row for row, effect in zip(rows, effects, strict=True) if effect <= 0.01][-1]
    assert f"a safe size: {' '.join(safe[1:3])}," in out
    code, out, error = run(
        "plan", str(folder), "--scores", str(scores), "--experts", "4", "--json", str(tmp_path / "a")
    )
    assert code == 0, error
    told = json.loads((tmp_path / "a").read_text())["result"]
    assert told["predicted_kl"] == pytest.approx(len(statistics.layers) / 4)
    zeros = ["--sparsify", "wanda", "--json", str(tmp_path / "b")]
    code, out, error = run("plan", str(folder), "--scores", str(scores), "--experts", "4", *zeros)
    assert code == 0, error
    assert json.loads((tmp_path / "b").read_text())["result"]["predicted_kl"] is None
    assert "no KL is predicted" in error
    assert "--experts 4 --sparsify wanda" in out
    assert not list(tmp_path.glob("*.mcsmoe-work"))


@pytest.fixture
def source(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a small model with a tokenizer, and text beside it."""
    folder = tmp_path / "source"
    build("mixtral").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text("\n".join(f"what is {n} {n % 7}" for n in range(32)))
    return folder


@pytest.mark.slow
def test_choices_are_measured_block_by_block(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ["plan", source, "--data", tmp_path / "text.txt", "--max-length", 8]
    measured = {}
    for name, more in (("loaded", ["--no-stream"]), ("streamed", ["--stream"]), ("chosen", [])):
        with monkeypatch.context() as patch:
            if name != "loaded":
                patch.setattr("hf_mcsmoe.cli.plan_measured.load_model", lambda *a, **k: pytest.fail("loaded"))
            if name == "chosen":
                patch.setattr("hf_mcsmoe.cli.way.free_memory", lambda: 0)
            files = ["--scores", tmp_path / f"{name}.safetensors", "--json", tmp_path / f"{name}.json"]
            code, _, error = run(*text, *more, *files)
        assert code == 0, error
        assert ("block by block (--no-stream loads all of it)" in " ".join(error.split())) == (name == "chosen")
        statistics = RoutingStatistics.load(files[1])
        told = json.loads(files[3].read_text())
        measured[name] = statistics.curves, statistics.conditions, told["sizes"], told["safe"], told["result"]
    assert measured["loaded"][0]
    assert measured["loaded"] == measured["streamed"] == measured["chosen"]
    code, _, error = run(*text, "--stream", "--scores", tmp_path / "streamed.safetensors")
    assert code == 0, error  # with the file that is there now
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--stream"], "--stream says how choices are measured on --data: give that as well"),
        (["--drop-source-cache"], "--drop-source-cache goes with --stream"),
        (["--stream", "--drop-source-cache", "--data", "no.txt"], "is a folder, of which nothing is fetched"),
    ],
)
def test_reading_block_by_block_that_has_nothing_to_say(options: list[str], told: str, source: Path, run: Run) -> None:
    code, _, error = run("plan", source, *options)
    assert (code, told in " ".join(error.split())) == (1, True)


def test_plan_of_a_configuration_alone(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "plan.json"
    code, out, error = run(
        "plan", str(CONFIGS / "gpt-oss-120b"), "--experts", "0.5", "--bits", "4", "--json", str(file)
    )
    assert code == 0, error
    assert "weights are quantized (mxfp4)" in error
    assert "36 layers of 128 experts, top-4" in out
    told = json.loads(file.read_text())
    assert told["figures"]["parameters"] == 116_829_156_672
    assert told["source"]["known_by"] == "configuration"
    half = 36 * 64 * 3 * 2880**2
    assert told["result"]["parameters"] == pytest.approx(116_829_156_672 - half, rel=1e-3)
    # Half of the experts in 4 bits and a scale of 16 for each group of 64; all else in bfloat16.
    rest = told["figures"]["parameters"] - told["figures"]["in_experts"]
    assert told["needs"]["streamed"]["memory"] < told["needs"]["in memory"]["memory"]
    assert told["needs"]["streamed"]["read"] == 2 * told["source"]["bytes"]
    assert f"here: {told['way']['name']}" in out
    assert told["result"]["bytes"] == pytest.approx(half * (4 + 16 / 64) / 8 + 2 * rest, rel=0.02)


def test_what_a_preset_keeps_in_place_of_pruned_experts_is_planned(tmp_path: Path, run: Run) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path / "model")
    told = {}
    for name, options in {
        "pruned": ["--reduce", "prune"],
        "constant": ["--reduce", "prune", "--pruned-router", "constant", "--repair", "none"],
        "mone": ["--preset", "mone"],
        "router-norm": ["--preset", "router-norm"],
        "aligned": [],
        "not": ["--alignment", "none"],
    }.items():
        code, _, error = run(
            "plan", str(tmp_path / "model"), "--experts", "4", *options, "--json", str(tmp_path / "a")
        )
        assert code == 0, (name, error)
        told[name] = json.loads((tmp_path / "a").read_text())
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    parameters = {name: item["result"]["parameters"] for name, item in told.items()}
    assert parameters["constant"] - parameters["pruned"] == layers * (model.config.num_local_experts - 4) * width
    assert parameters["mone"] == parameters["constant"]
    assert parameters["router-norm"] - parameters["pruned"] == layers * width, "one of zeros for all"
    assert told["mone"]["run"]["repair"] == "none"
    assert [told[name]["run"]["aligned"] for name in ("aligned", "not", "mone")] == [True, False, False]


REFUSED = [
    ("empty", [], "holds no config.json"),
    ("dense", [], "has no Mixture-of-Experts layer"),
    ("moe", ["--experts", "129"], "more than the 128 experts"),
    ("moe", ["--experts", "none"], "neither a whole number (8) nor a share (0.5)"),
    ("moe", ["--experts", "4", "--reduce", "prune"], "less than the 8 experts a layer that the routers need"),
    ("moe", ["--reduce", "marge"], "must be one of"),
    ("moe", ["--experts", "8", "--bits", "5"], "none of the bits"),
    ("moe", ["--experts", "8", "--skip", "nothing"], "matches no layer"),
    ("moe", ["--experts", "8", "--rank", "4000"], "larger than"),
    ("moe", ["--size", "1MB"], "smallest that can be reached"),
    ("moe", ["--experts", "8", "--memory", "0.5"], "is no amount of memory: give bytes"),
    ("moe", ["--budget", "uniform"], "does nothing beside size=0.5"),
    ("moe", ["--preset", "mone"], "give --experts as well"),
    ("moe", ["--experts", "8", "--repair", "refits"], "Did you mean 'refit'?"),
    ("outside", [], "which is no safetensors file in its folder"),
    ("no/such", [], "Found no model"),
]


@pytest.mark.parametrize(("model", "options", "message"), REFUSED)
def test_what_cannot_be_planned_is_one_sentence(
    model: str, options: list[str], message: str, tmp_path: Path, run: Run
) -> None:
    whole = json.loads((CONFIGS / "Qwen3-30B-A3B" / "config.json").read_text())
    config = json.dumps(whole | {"num_hidden_layers": 2, "vocab_size": 1000})
    files = {"moe": config, "outside": config, "dense": DENSE}
    for name in ("empty", *files):
        (tmp_path / name).mkdir()
        if name in files:
            (tmp_path / name / "config.json").write_text(files[name])
    index = {"weight_map": {"lm_head.weight": "../other.safetensors"}}
    (tmp_path / "outside" / "model.safetensors.index.json").write_text(json.dumps(index))
    name = model if "/" in model else str(tmp_path / model)
    code, _, error = run("plan", name, *options)
    assert code == 1
    assert message in " ".join(error.split())
    assert "Traceback" not in error
