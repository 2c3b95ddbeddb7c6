"""Compress a random checkpoint from folder to folder in a process of little memory: time, peak of memory, bytes read.

    python examples/benchmarks/larger_than_memory.py FOLDER --gigabytes 30 --limit 6
    python examples/benchmarks/larger_than_memory.py FOLDER --gigabytes 4 --limit 1.5 --num-experts 32

The source is of the shape of Qwen3-30B-A3B (128 experts of 2048 x 768 a layer, unless told otherwise), with as many
layers as the bytes ask for; it is made in FOLDER and deleted with the result afterwards. The peak is that of the
process as Linux counts it (VmHWM), mapped files included; a peak over the limit, in GB, is a failure. Rows: 16 of 64
tokens.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from hf_mcsmoe import MergeConfig, RepairConfig
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.progress import Progress
from hf_mcsmoe.streamed.compress import compress_folder

VOCABULARY, ROWS, LENGTH = 4096, 16, 64
GIGABYTE = 10**9


def config_of(gigabytes: float, num_experts: int) -> Qwen3MoeConfig:
    """Return the configuration of a model of so many bytes, with so many experts a layer."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=num_experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    experts = config.num_experts * 3 * config.hidden_size * config.moe_intermediate_size
    config.num_hidden_layers = max(1, round(gigabytes * GIGABYTE / 2 / experts))
    config.max_window_layers = config.num_hidden_layers
    return config


def make(folder: Path, gigabytes: float, num_experts: int) -> None:
    """Write the checkpoint, a shard for each layer, with the names that the family has on disk."""
    folder.mkdir(parents=True)
    config = config_of(gigabytes, num_experts)
    config.save_pretrained(folder)
    size, heads, width = config.hidden_size, config.num_attention_heads * 128, config.moe_intermediate_size
    shapes = {"q_proj": (heads, size), "k_proj": (512, size), "v_proj": (512, size), "o_proj": (size, heads)}
    ends = {"model.embed_tokens.weight": random(VOCABULARY, size), "model.norm.weight": ones(size)}
    names = write(folder / "rest.safetensors", ends)
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        tensors = {f"{name}.self_attn.{part}.weight": random(*shape) for part, shape in shapes.items()}
        tensors |= {f"{name}.self_attn.{part}_norm.weight": ones(128) for part in "qk"}
        tensors |= {f"{name}.{part}_layernorm.weight": ones(size) for part in ("input", "post_attention")}
        tensors[f"{name}.mlp.gate.weight"] = random(config.num_experts, size)
        for number in range(config.num_experts):
            expert = f"{name}.mlp.experts.{number}"
            tensors |= {f"{expert}.{part}_proj.weight": random(width, size) for part in ("gate", "up")}
            tensors[f"{expert}.down_proj.weight"] = random(size, width)
        names |= write(folder / f"layer-{layer:03d}.safetensors", tensors)
    index = {"metadata": {"total_size": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": names}))


def random(*shape: int) -> torch.Tensor:
    """Return a matrix that keeps the scale of its input."""
    return torch.randn(shape, dtype=torch.bfloat16) * shape[-1] ** -0.5


def ones(size: int) -> torch.Tensor:
    """Return the weight of a norm."""
    return torch.ones(size, dtype=torch.bfloat16)


def write(file: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Write a shard, and return where its tensors are."""
    save_file(tensors, file, {"format": "pt"})
    return dict.fromkeys(tensors, file.name)


def told() -> Progress:
    """Return what prints each stage as it begins and ends."""
    started = time.perf_counter()

    def tell(stage: str, done: int, total: int | None) -> None:
        if done in (0, total):
            print(f"{time.perf_counter() - started:7.0f} s  {stage} {done} / {total}", file=sys.stderr, flush=True)

    return tell


def status(file: str, key: str) -> int:
    """Return a number that Linux tells of this process."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def measured(arguments: argparse.Namespace) -> dict[str, float]:
    """Compress in this process; what it took is returned as JSON values."""
    torch.set_num_threads(arguments.threads)
    generator, begin = torch.Generator().manual_seed(0), time.perf_counter()
    rows = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    batches = [{"input_ids": rows}]
    config = MergeConfig(experts=0.5, budget="uniform", alignment=arguments.alignment)
    repair = None if arguments.repair == "none" else RepairConfig(method=arguments.repair)
    base = status("status", "VmHWM") * 1024
    compress_folder(
        Folder(arguments.folder / "source"),
        arguments.folder / "result",
        batches,
        config,
        repair=repair,
        progress=told(),
    )
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "base": base, "peak": status("status", "VmHWM") * 1024, "read": status("io", "rchar")}


def main() -> None:
    """Print one line of a table; fail where the peak is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to work in; there must be room for twice the bytes")
    parser.add_argument("--gigabytes", type=float, default=30, help="bytes of the source (default %(default)s)")
    parser.add_argument("--limit", type=float, default=6, help="GB that the process may hold (default %(default)s)")
    parser.add_argument("--num-experts", type=int, default=128, help="experts of a layer (default %(default)s)")
    parser.add_argument("--alignment", default="none", help="as in MergeConfig (default %(default)s)")
    parser.add_argument("--repair", default="none", help="none, refit or local (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default %(default)s)")
    parser.add_argument("--measured", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measured:
        print(json.dumps(measured(arguments)))
        return
    try:
        make(arguments.folder / "source", arguments.gigabytes, arguments.num_experts)
        sizes = [size_of(arguments.folder / "source")]
        command = [sys.executable, __file__, *sys.argv[1:], "--measured"]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        sizes.append(size_of(arguments.folder / "result"))
    finally:
        for name in ("source", "result"):
            shutil.rmtree(arguments.folder / name, ignore_errors=True)
    print("| source | result | peak | of it before | read | seconds |", "|---:|---:|---:|---:|---:|---:|", sep="\n")
    values = [*sizes, found["peak"], found["base"], found["read"]]
    print(f"| {' | '.join(f'{value / GIGABYTE:.2f} GB' for value in values)} | {found['seconds']:.0f} |")
    if found["peak"] > arguments.limit * GIGABYTE:
        sys.exit(f"The peak is over the {arguments.limit} GB that were allowed.")


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
