"""What a model costs: parameters, bytes, and the operations that a real forward executes."""

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, mm_flop
from transformers import PreTrainedModel

from hf_mcsmoe.data.batches import as_batches
from hf_mcsmoe.layers.batches import Batch, evaluation_mode, forward, hooks
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.packing import unpacked
from hf_mcsmoe.modeling.losparse_mcsmoe import final_rows, sparse_parts
from hf_mcsmoe.modeling.quantized_mcsmoe import uncounted
from hf_mcsmoe.record import Costs

# Forwards that commands time, of which the fastest counts.
REPETITIONS = 3


def account(
    model: PreTrainedModel | Layers,
    batch: Batch | None = None,
    folder: str | Path | None = None,
    *,
    repetitions: int = 0,
) -> Costs:
    """Return what `model` holds and, on `batch`, executes. The model is left as it was.

    Args:
        model: a model, or its layers where they are found already.
        batch: a dictionary for `model(**batch)`; what it takes is counted in a forward of it, per position.
        folder: where the model is saved.
        repetitions: forwards to time, of which the fastest counts; none by default.

    Raises:
        ValueError: `folder` has no safetensors file, or there is no batch to time.
    """
    if repetitions and batch is None:
        raise ValueError(f"repetitions={repetitions} needs a batch to run: pass one for model(**batch).")
    found = model
    model = found.model if isinstance(found, Layers) else found
    tensors = [*model.parameters(), *model.buffers()]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    on_disk = None if folder is None else bytes_on_disk(folder)
    if batch is None:
        return Costs(model.num_parameters(), held, on_disk)
    (batch,) = as_batches([batch], model)
    batch = unpacked(batch, encoder_decoder=model.config.is_encoder_decoder)
    with torch.no_grad(), evaluation_mode(model), _frozen(model):
        flops, experts = _count(model, found, batch)
        seconds = min((_seconds(model, batch) for _ in range(repetitions)), default=None)
    speed = None if seconds is None else _positions(model, batch) / seconds
    costs = Costs(model.num_parameters(), held, on_disk, tokens_per_second=speed)
    return with_flops(costs, model, batch, flops, experts)


def with_flops(costs: Costs, model: PreTrainedModel, batch: Batch, flops: int, experts: Mapping[str, int]) -> Costs:
    """Return the costs with what a forward of a batch executes, and by layer name its experts, per position."""
    tokens = _positions(model, batch)
    macs = {name: count / 2 / tokens for name, count in experts.items()}
    return replace(costs, flops_per_token=flops / tokens, expert_macs_per_token=macs)


def bytes_on_disk(folder: str | Path) -> int:
    """Return the bytes of the safetensors files of a saved model.

    Raises:
        ValueError: there is none.
    """
    files = list(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no safetensors file; save the model there first.")
    return sum(file.stat().st_size for file in files)


def folder_bytes(model: str | Path | None) -> int | None:
    """Return the bytes of a folder's safetensors; None for no name, a Hub id and weights in another format."""
    return bytes_on_disk(model) if model and any(Path(model).glob("*.safetensors")) else None


def saved_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of the tensors that a model is saved with as it is, shared ones once, without headers."""
    saved = model.state_dict().keys()
    buffers = [tensor for name, tensor in model.named_buffers() if name in saved]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *buffers])


def saved_costs(model: PreTrainedModel) -> Costs:
    """Return what a compressed model holds as it will be saved: S compact, without adapters. Runs no forward.

    Of a model in the plain form of its family it is all that it holds.
    """
    if not hasattr(model.config, "mcsmoe"):
        size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        return Costs(model.num_parameters(), size, saved_bytes(model))
    own = [(name, tensor) for name, tensor in model.named_parameters() if ".lora_" not in name]
    buffers, saved = dict(model.named_buffers()), model.state_dict().keys()
    parameters = sum(tensor.numel() for _, tensor in own) + uncounted(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in [*dict(own).values(), *buffers.values()])
    unsaved = sum(tensor.numel() * tensor.element_size() for name, tensor in buffers.items() if name not in saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows yet to be pruned are spoken of when they are
        kept = final_rows(model, model.config.mcsmoe.get("keep"))
    for name, part in sparse_parts(model).items():
        rows = int(kept[name].sum())
        gone = (kept[name].numel() - rows) * part.weight.shape[-1]
        parameters -= gone
        size += rows * torch.int32.itemsize - kept[name].numel() - gone * part.weight.element_size()
    return Costs(parameters, size, size - unsaved)


def layer_bytes(model: PreTrainedModel | Layers) -> dict[str, tuple[int, int]]:
    """Return, by the original name of each layer, the bytes of its experts before the merge and as they are stored.

    Those of layers that share experts are told under the first of them. Works on the meta device, without memory; what
    the original held is taken to have had the model's present dtype.
    """
    layers = Layers.of(model)
    sizes = {}
    for layer, *_ in layers.tied:
        stored = layer.container.state_dict().values()
        before = layer.num_original * _expert_parameters(layer, None, 0.0) * layers.model.dtype.itemsize
        sizes[layer.original_name] = round(before), sum(tensor.numel() * tensor.element_size() for tensor in stored)
    return sizes


def expert_parameters(model: PreTrainedModel | Layers) -> int:
    """Return the parameters in all layers of experts, those that layers share once."""
    return sum(shared[0].num_parameters for shared in Layers.of(model).tied)


def expected_parameters(
    model: PreTrainedModel | Layers, stored: Mapping[str, int], *, rank: int | None = None, keep: float = 0.0
) -> int:
    """Return, from sizes alone, the parameters of `model` once it is merged and, with `rank`, decomposed.

    Works on the meta device, without memory (Merge, Then Compress, section 3.2: each matrix [out, in] of the layers of
    `stored` becomes U [out, R], V [R, in] and a share of the rows of S).

    Args:
        stored: experts G per layer name; other layers stay whole and dense.
        rank: R.
        keep: share of the entries of S, rounded once: rows are kept by one threshold for all.

    Raises:
        ValueError: a name that no layer has.
    """
    layers = Layers.of(model)
    if unknown := stored.keys() - {layer.name for layer in layers}:
        raise ValueError(f"The model has no layer {min(unknown)!r}; its layers: {', '.join(layers.names)}.")
    total: float = layers.model.num_parameters()
    for layer, *_ in layers.only([layer for layer in layers if layer.name in stored]).tied:
        total += stored[layer.name] * _expert_parameters(layer, rank, keep) - layer.num_parameters
    return round(total)


def _expert_parameters(layer: MoELayer, rank: int | None, keep: float) -> float:
    """Return the parameters of one expert as stored: gate above up in one matrix."""
    expert = layer.read_first()
    biases = sum(tensor.numel() for role, tensor in expert.items() if role.endswith("_bias"))
    (width, hidden_size), parts = expert["up"].shape, 1 + ("gate" in expert)
    matrices = [(parts * width, hidden_size), (hidden_size, width)]
    if rank is None:
        return biases + sum(rows * columns for rows, columns in matrices)
    return biases + sum(rank * (rows + columns) + keep * rows * columns for rows, columns in matrices)


def _positions(model: PreTrainedModel, batch: Batch) -> int:
    """Return the positions of a batch, those of encoder and decoder together."""
    names: list[tuple[str, ...]] = [("input_ids", "inputs_embeds")]
    if model.config.is_encoder_decoder or batch.get("decoder_input_ids") is not None:
        names.append(("decoder_input_ids", "decoder_inputs_embeds", "labels"))
    inputs = [next(batch[name] for name in side if batch.get(name) is not None) for side in names]
    return sum(values.shape[0] * values.shape[1] for values in inputs)


def _seconds(model: PreTrainedModel, batch: Batch) -> float:
    started = time.perf_counter()
    forward(model, batch)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - started


@contextlib.contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Let no parameter need a gradient: the counter follows those that do, also where no graph is built."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


def _count(model: PreTrainedModel, found: PreTrainedModel | Layers, batch: Batch) -> tuple[int, dict[str, int]]:
    """Return the FLOPs of one forward, and those of the experts by layer name."""
    modules, counting = _expert_modules(found), Counting()
    counting.experts = dict.fromkeys(modules, 0)
    with counting.watching(modules), counting.counter:
        forward(model, batch)
    return counting.counter.get_total_flops(), counting.experts


class _Untracked:
    """In place of what tells the counter which modules run: that follows those of other threads as well."""

    parents = frozenset(["Global"])

    def __enter__(self) -> "_Untracked":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave all as it is."""


class Counting:
    """Counts the FLOPs of a forward within `counter`, and by layer name those of experts while they are watched."""

    def __init__(self) -> None:
        """Begin with none."""
        self.counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        self.counter.mod_tracker = _Untracked()  # type: ignore[assignment]
        self.experts: dict[str, int] = {}

    @contextlib.contextmanager
    def watching(self, experts: Mapping[str, list[nn.Module]]) -> Iterator[None]:
        """Add what is counted while modules of experts run to the sums of their layers."""
        with hooks() as handles:
            for name, modules in experts.items():
                before, after = partial(self._add, name, -1), partial(self._add, name, 1)
                for module in modules:
                    handles.extend([module.register_forward_pre_hook(before), module.register_forward_hook(after)])
            yield

    def _add(self, name: str, sign: int, *_: Any) -> None:
        self.experts[name] = self.experts.get(name, 0) + sign * self.counter.get_total_flops()


def _expert_modules(model: PreTrainedModel | Layers) -> dict[str, list[nn.Module]]:
    """Return, per layer of experts, the modules that hold its parameters; nothing for a dense model."""
    with contextlib.suppress(ValueError):  # a dense model has no layers
        return {layer.name: expert_modules(layer) for layer in Layers.of(model)}
    return {}


def expert_modules(layer: MoELayer) -> list[nn.Module]:
    """Return the modules that hold the parameters of a layer's experts."""
    owners = dict.fromkeys(path.rpartition(".")[0] for path, _ in layer.parameters)
    return [layer.container.get_submodule(path) for path in owners]


def _grouped_mm_flop(
    states: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    """Return the FLOPs of a product of `states` [N, in] with `weight` [G, in, out].

    Rows from the last of the offsets int [G] on belong to no expert and are not computed.
    """
    return 2 * int(offs[-1]) * weight.shape[-2] * weight.shape[-1]


# The counter takes this to mean that a formula wants the tensors themselves, not their shapes.
_grouped_mm_flop._get_raw = True  # type: ignore[attr-defined]


def _attention_flop(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of attention by the shapes [B, H, S, d] of its inputs, as if it were not causal.

    Keys and values may have fewer heads, each of which serves several of the queries' (PyTorch's own count has refused
    that in some versions).
    """
    batch, heads, length, size = query
    return 2 * batch * heads * length * key[-2] * (size + value[-1])


def _addmm_flop(added: Any, first: Any, second: Any, **kwargs: Any) -> int:
    """Return the FLOPs of a product of matrices by their shapes that is added in place."""
    return mm_flop(first, second)


# What the counter of PyTorch does not know.
FORMULAS = {
    torch.ops.aten.addmm_: _addmm_flop,
    torch.ops.aten._grouped_mm: _grouped_mm_flop,
    torch.ops.transformers.grouped_mm_fallback: _grouped_mm_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention: _attention_flop,
    torch.ops.aten._scaled_dot_product_efficient_attention: _attention_flop,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _attention_flop,
}
