"""Run by tests, once for each of two processes: a compressed model computes alike under every layout of processes.

Arguments: rank, a port for the processes to meet, a file for the report, "computed" or "trained", folders. Imports
nothing of the package.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

LAYOUTS: dict[str, dict[str, int]] = {
    "plain": {},
    "tp": {"tp_size": 2},
    "fsdp": {"fsdp_size": 2},
    "tp and ep": {"tp_size": 2, "ep_size": 2},
    "fsdp and ep": {"fsdp_size": 2, "ep_size": 2},
}
W_OUT = tuple(f".experts.down_proj{end}" for end in ("", "_u", "_packed"))


def local_shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    """Return the shapes that this process holds: of the first W_out of experts and of the first queries."""
    shapes: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if name.endswith(W_OUT):
            shapes.setdefault("experts", list(local.shape))
        elif name.endswith(("self_attn.q_proj.weight", "self_attn.q_b_proj.weight")):
            shapes.setdefault("attention", list(local.shape))
    return shapes


def loaded(folder: str, layout: dict[str, int]) -> Any:
    """Load a model in a layout."""
    options = {"distributed_config": DistributedConfig(**layout)} if layout else {}
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of which this process may hold a part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradients of one step of training, by the parameter's name."""
    model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    found = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return {name: whole(gradient) for name, gradient in found if gradient is not None}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest distance of tensors of the same names, over the largest norm of what is expected."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    largest = max(float(values.norm()) for values in expected.values())
    return max(float((found[name] - values).norm()) for name, values in expected.items()) / largest


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Return all that a folder stores."""
    return {name: values for file in Path(folder).glob("*.safetensors") for name, values in load_file(file).items()}


def tried(folder: str, layout: dict[str, int], expected: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    """Return how far the logits are from those that were written with the model, and what this process holds.

    And, with the gradients that are `expected`, how far those are, and whether what is saved is what was read.
    """
    case, model = torch.load(f"{folder}.pt"), loaded(folder, layout)
    shapes = local_shapes(model)  # before a forward gathers what is split
    with torch.no_grad():
        logits = whole(model(**case["batch"], use_cache=False).logits)
    found = {"distance": float((logits - case["logits"]).abs().max()), **shapes}
    if expected is None:
        return found
    found["gradients"] = distance(gradients(model, case["batch"]), expected)
    model.save_pretrained("again")
    stored, again = weights(folder), weights("again")
    is_same = stored.keys() == again.keys() and all(torch.equal(again[name], stored[name]) for name in stored)
    return found | {"saved": is_same}


def main() -> None:
    """Meet the other process and try every layout on every folder."""
    rank, port, report, checks, *folders = sys.argv[1:]
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for folder in folders:
        expected = None
        if checks == "trained":
            expected = gradients(loaded(folder, {}), torch.load(f"{folder}.pt")["batch"])
        found |= {f"{Path(folder).name}, {name}": tried(folder, LAYOUTS[name], expected) for name in LAYOUTS}
    assert not any(name.startswith("hf_mcsmoe") for name in sys.modules)
    if rank == "0":
        Path(report).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
