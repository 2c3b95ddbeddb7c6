"""What `hf-mcsmoe plan` says beforehand, against what a run then takes: bytes of the result, memory, and time.

Each family gets a checkpoint of some hundred megabytes, of random weights; each way runs in a process of its own, and
the largest resident set of that (VmHWM, Linux) counts, pages of mapped files included. Half of the experts are merged.
With `--time` the machine is measured just before, as `plan --time` does, on one thread like the run.

`--smaller 4` divides widths and numbers of experts, for repairs that take minutes at full width. Seconds are of the
CPU, which others on the machine do not lengthen; what the clock said stands behind.

python examples/benchmarks/plan_accuracy.py --families qwen3_moe,mixtral --repair refit --time
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from hf_mcsmoe import MergeConfig, RepairConfig, compress
from hf_mcsmoe.cli.way import swept
from hf_mcsmoe.evaluation.costs import bytes_on_disk
from hf_mcsmoe.forecast.duration import seconds_of
from hf_mcsmoe.forecast.figures import figures_of
from hf_mcsmoe.forecast.machine import measure_pace, resident
from hf_mcsmoe.forecast.needs import IN_MEMORY, STREAMED, Needs, Run, needs_of
from hf_mcsmoe.forecast.result import result_by_hand
from hf_mcsmoe.forecast.run import run_of
from hf_mcsmoe.forecast.sizes import sizes_of
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.loading import empty_model, load_model
from hf_mcsmoe.methods.budget import MEASURED
from hf_mcsmoe.repair.methods import REPAIR
from hf_mcsmoe.search.config import SizeConfig
from hf_mcsmoe.search.size import bytes_of
from hf_mcsmoe.streamed.compress import compress_folder

ROWS, LENGTH, BATCH = 8, 64, 4
BEGINNING = resident() or 0  # that a process holds before it does anything; this one makes models
VOCABULARY, D, EXPERTS = 8192, 1024, 64
COMMON: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": D, "num_attention_heads": 8, "num_key_value_heads": 4},
    **{"num_hidden_layers": 3, "head_dim": 128, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2},
}
FINE: dict[str, Any] = {"moe_intermediate_size": 256, "intermediate_size": 2048, "num_experts_per_tok": 8}
SHARED: dict[str, Any] = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
# By family: the class of the model, and its sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**COMMON, **FINE, "num_experts": EXPERTS}),
    "mixtral": (
        "MixtralForCausalLM",
        {**COMMON, "intermediate_size": 1024, "num_local_experts": 16, "num_experts_per_tok": 2},
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        {**COMMON, "intermediate_size": 256, "num_experts": EXPERTS, "num_experts_per_tok": 8},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **COMMON,
            **FINE,
            **SHARED,
            **LATENT,
            "head_dim": 32,
            "num_key_value_heads": 8,
            "n_group": 8,
            "topk_group": 4,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**COMMON, "intermediate_size": 512, "num_local_experts": 32, "num_experts_per_tok": 4},
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", {**COMMON, **FINE, **SHARED, "n_group": 1, "topk_group": 1}),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        {
            **{"vocab_size": VOCABULARY, "d_model": 768, "d_ff": 1024, "d_kv": 64, "num_heads": 12},
            **{"num_experts": 32, "num_layers": 2, "num_decoder_layers": 2, "decoder_start_token_id": 0},
            **{"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        },
    ),
}


# Sizes that `--smaller` divides.
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "d_model", "d_ff")
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Asked:
    """What is compressed, and how."""

    repair: str
    budget: str
    size: float | None
    smaller: int

    @property
    def method(self) -> str:
        """The repair; of a size that by default."""
        return "joint" if self.size and self.repair == "none" else self.repair

    @property
    def arguments(self) -> list[str]:
        """The same for the command line."""
        given = ["--repair", self.repair, "--budget", self.budget, "--smaller", str(self.smaller)]
        return given + (["--size", str(self.size)] if self.size else [])


def main() -> None:
    """Print a table with three rows per family, or, as the process that is measured, one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="default: %(default)s")
    parser.add_argument("--repair", choices=list(REPAIR), default="none")
    parser.add_argument("--size", type=float, help="a share of the source's bytes, in place of half of the experts")
    parser.add_argument("--time", action="store_true", help="compare seconds as well")
    parser.add_argument("--smaller", type=int, default=1, help="divide widths and numbers of experts by this")
    parser.add_argument("--budget", choices=("adaptive", MEASURED), default="adaptive")
    parser.add_argument("--way", choices=(IN_MEMORY, STREAMED), help="run it in this process, and print its memory")
    parser.add_argument("--folder", type=Path, help="with --way: the model, and below it the result")
    arguments = parser.parse_args()
    asked = Asked(arguments.repair, arguments.budget, arguments.size, arguments.smaller)
    if arguments.way:
        print(json.dumps(run(arguments.folder, arguments.way, asked)))
    else:
        print("| family | what | predicted | measured | predicted / measured |\n|---|---|---:|---:|---:|")
        for name in arguments.families.split(","):
            compare(name, asked, is_timed=arguments.time)


def compare(name: str, asked: Asked, *, is_timed: bool) -> None:
    """Print prediction and measurement of a family: the bytes of the result, and memory and time both ways."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        make(name, folder, asked.smaller)
        layers, result, wanted, predicted = predict(folder, asked)
        told = {"bytes": ("bytes", result)}
        for way, needs in predicted.items():
            parts = estimate(folder, layers, wanted, needs) if is_timed else {}
            command = [sys.executable, __file__, "--way", way, "--folder", str(folder), *asked.arguments]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured = json.loads(output.splitlines()[-1])
            told[f"memory {way} ({needs.peak})"] = ("memory", needs.memory)
            for what, (key, value) in told.items():
                show(name, what, value / 1e6, measured[key] / 1e6, "MB")
            if parts:
                seconds, most = sum(parts.values()), max(parts, key=lambda part: parts[part])
                waited = f" of {measured['waited']:.1f}"
                show(name, f"time {way} (most {most})", seconds, measured["seconds"], "s", waited)
            told = {}


def show(name: str, what: str, predicted: float, measured: float, unit: str, more: str = "") -> None:
    """Print a row."""
    ratio, number = predicted / measured, ".0f" if unit == "MB" else ".1f"
    cells = f"{predicted:{number}} {unit} | {measured:{number}}{more} {unit} | {ratio:.3f}"
    print(f"| {name} | {what} | {cells} |", flush=True)


def estimate(folder: Path, layers: Layers, wanted: Run, needs: Needs) -> dict[str, float]:
    """Return the seconds that are told of a run, part by part, after measuring this machine."""
    torch.set_num_threads(1)
    sizes = sizes_of(layers)
    tokens = max(1, BATCH * LENGTH * sizes.top_k // sizes.num_experts)
    pace = measure_pace(tokens, sizes.hidden_size, sizes.intermediate_size, layers.model.dtype, folder)
    return seconds_of(sizes, figures_of(layers), replace(wanted, threads=1), needs, pace)


def predict(folder: Path, asked: Asked) -> tuple[Layers, int, Run, dict[str, Needs]]:
    """Return what is known beforehand, from the configuration and the length of the files."""
    layers = Layers.of(empty_model(str(folder)))
    config, search = MergeConfig(experts=0.5, budget=asked.budget), SizeConfig.of(asked.size)
    result, source = result_by_hand(layers, config), bytes_on_disk(folder)
    if search:
        result = replace(result, bytes=bytes_of(search.size, source))
    judged = {"rows": ROWS, "judged": 0, "length": LENGTH, "batch_size": BATCH}
    wanted = run_of(layers, result, config, repair=asked.method, stores=search is not None, **judged)
    wanted = swept(wanted, layers, config, {"size": search, "low_rank": None}, None)
    return layers, result.bytes, wanted, needs_of(sizes_of(layers), wanted, source, base=BEGINNING)


def make(name: str, folder: Path, smaller: int = 1) -> None:
    """Write the checkpoint of a family."""
    kind, sizes = FAMILIES[name]
    sizes = {key: value // smaller if key in (*WIDTHS, *COUNTS) else value for key, value in sizes.items()}
    model_class: type[PreTrainedModel] = getattr(transformers, kind)
    config: PreTrainedConfig = model_class.config_class(**sizes)
    with torch.device("meta"):
        model = model_class(config).to(torch.float32)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
        for buffer in model.buffers():
            buffer.zero_()
    model.save_pretrained(folder)


def run(folder: Path, way: str, asked: Asked) -> dict[str, float]:
    """Compress a folder; return memory that this process took at most, the bytes of the result, and seconds.

    Of the seconds the CPU worked for `seconds`, and the clock went on by `waited`.
    """
    warnings.simplefilter("ignore")  # so few tokens that the groups mean nothing
    torch.set_num_threads(1)
    generator, target = torch.Generator().manual_seed(0), folder.parent / way
    config = MergeConfig() if asked.size else MergeConfig(experts=0.5, budget=asked.budget)
    rows = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(BATCH)]
    if empty_model(str(folder)).config.is_encoder_decoder:
        batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    wanted = None if asked.method == "none" else RepairConfig(method=asked.method)
    options: dict[str, Any] = {"repair": wanted, "size": asked.size}
    begin, worked = time.perf_counter(), time.process_time()
    if way == IN_MEMORY:
        is_used_up = wanted is None and asked.size is None
        result = compress(load_model(str(folder)), batches, config, consume=is_used_up, **options)
        result.save_pretrained(target)
    else:
        compress_folder(folder, target, batches, config, **options)
    seconds = {"waited": time.perf_counter() - begin, "seconds": time.process_time() - worked}
    return {"memory": resident("VmHWM") or 0, "bytes": bytes_on_disk(target), **seconds}


if __name__ == "__main__":
    main()
