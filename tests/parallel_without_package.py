"""Run by tests, once for each of two processes: a merged model under every layout of processes gives the same logits.

Arguments: rank, a port for the processes to meet, a file for the report, folders. Imports nothing of the package.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

LAYOUTS: dict[str, dict[str, int]] = {
    "plain": {},
    "tp": {"tp_size": 2},
    "fsdp": {"fsdp_size": 2},
    "tp and ep": {"tp_size": 2, "ep_size": 2},
    "fsdp and ep": {"fsdp_size": 2, "ep_size": 2},
}


def local_shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    """Return the shapes that this process holds: of the first W_out of experts, or its U, and of the first queries."""
    shapes: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if name.endswith((".experts.down_proj", ".experts.down_proj_u")):
            shapes.setdefault("experts", list(local.shape))
        elif name.endswith(("self_attn.q_proj.weight", "self_attn.q_b_proj.weight")):
            shapes.setdefault("attention", list(local.shape))
    return shapes


def tried(folder: str, layout: dict[str, int]) -> dict[str, Any]:
    """Return how far the logits are from those that were written with the model, and what this process holds."""
    expected = torch.load(f"{folder}.pt")
    options = {"distributed_config": DistributedConfig(**layout)} if layout else {}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    shapes = local_shapes(model)  # before a forward gathers what is split
    with torch.no_grad():
        logits = model(**expected["batch"], use_cache=False).logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    return {"distance": float((logits - expected["logits"]).abs().max()), **shapes}


def main() -> None:
    """Meet the other process and try every layout on every folder."""
    rank, port, report, *folders = sys.argv[1:]
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {f"{Path(folder).name}, {name}": tried(folder, LAYOUTS[name]) for folder in folders for name in LAYOUTS}
    assert not any(name.startswith("hf_mcsmoe") for name in sys.modules)
    if rank == "0":
        Path(report).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
