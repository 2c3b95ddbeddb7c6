"""MC-SMoE: merged experts as low rank + structured sparse, `W = U V + S` (paper, section 3.2)."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_mcsmoe.attached import attach_record, record_of
from hf_mcsmoe.calibration.inputs import LayerInputs, stream_inputs
from hf_mcsmoe.data.batches import as_batches
from hf_mcsmoe.evaluation.costs import saved_costs
from hf_mcsmoe.layers.batches import Batch
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.sharded import check_whole
from hf_mcsmoe.layers.whole import convert_whole
from hf_mcsmoe.low_rank.config import LoSparseConfig
from hf_mcsmoe.low_rank.ranks import layer_ranks, layers_to_decompose
from hf_mcsmoe.low_rank.split import FACTORISATION, refit_output, split, split_columns
from hf_mcsmoe.methods.checks import check_given
from hf_mcsmoe.modeling.auto import compression
from hf_mcsmoe.modeling.convert import write_description
from hf_mcsmoe.modeling.forward_mcsmoe import activated, expert_hidden, expert_inner, merge_picks, unstacked
from hf_mcsmoe.modeling.losparse_mcsmoe import SparsePart, compact_rows, final_rows, low_rank_modules
from hf_mcsmoe.modeling.modeling_mcsmoe import decomposable
from hf_mcsmoe.modeling.quantized_mcsmoe import quantized_modules
from hf_mcsmoe.record import LOW_RANK, Step

Model = TypeVar("Model", bound=nn.Module)
# One expert's matrix [out, in]; on calibration data the second moment of its inputs [in, in] and, for W_in, what an
# error of each row counts [out].
Part = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
Progress = Callable[[str, int, int], None]


@torch.no_grad()
def decompose_experts(
    model: PreTrainedModel | Layers,
    config: LoSparseConfig | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    prune: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Turn each merged expert's matrices, in place, into `W = U V + S` in the training form, and return the model.

    Without `prune` the weights are exactly those before: S is what U V lacks, to be pruned while training. With it
    what S keeps is chosen now, by what it means to the outputs, and W_out is fitted to what W_in has become; give
    `batches` for that. S keeps hidden units: rows of W_in, columns of W_out (called its rows elsewhere). Then
    `compact` drops the others.

    Layers whose experts the merge kept all (`MergeConfig(experts=1.0)`: low rank without merging) are decomposed as
    well; those that `MergeConfig.skip` left out stay as they are.

    Args:
        batches: calibration data. The factors then err least on the experts' inputs instead of least by themselves.
        progress: called as `progress(layer name, matrices done, matrices)`, first when none is done.

    Raises:
        ValueError: a model without merged experts, decomposed or quantized already, a rank larger than a matrix,
            factors that are larger than the matrix, a pattern of `skip` that matches nothing, or offloaded experts.
    """
    check_given(config=(config, (LoSparseConfig, NoneType)))
    found = Layers.of(model)
    check_whole(found.model, "a decomposition")
    decompose_layers(found, config or LoSparseConfig(), batches, prune=prune, progress=progress)
    _renew_costs(found.model)
    return found.model


@torch.no_grad()
def decompose_layers(
    found: Layers,
    config: LoSparseConfig,
    batches: Iterable[Batch] | None = None,
    *,
    prune: bool = False,
    progress: Progress | None = None,
) -> Layers:
    """Do what `decompose_experts` does, but for the record: it is written once, when all is done.

    Returns the layers as they are then: those that the merge had left whole count as merged.
    """
    given = None if batches is None else list(as_batches(batches, found.model))
    model, chosen = found.model, _chosen_layers(found, config)
    ranks, names = layer_ranks(chosen, config), {layer.original_name for layer in chosen}
    whole = [layer for layer in chosen if not layer.merged]
    for layer in whole:
        convert_whole(model, layer)
    found = Layers.of(found.source) if whole else found
    layers = [layer for layer in found if layer.original_name in names]
    total = sum(len(own) * layer.container.num_experts for own, layer in zip(ranks, layers, strict=True))
    count = _Count(total, progress)
    for layer in layers[:1]:
        count.tell(layer.name)
    # All inputs are taken before the first layer changes, as far as they fit into memory.
    groups = [[layer] for layer in layers]
    streamed = ((group, None) for group in groups) if given is None else stream_inputs(groups, given)
    for (_, inputs), layer, own in zip(streamed, layers, ranks, strict=True):
        _decompose_layer(layer.container, own, config, inputs, prune, partial(count.over, layer.name))
    write_description(model, keep=config.keep)
    return found


@torch.no_grad()
def compact(model: Model, keep: float | None = None) -> Model:
    """Turn every S from the training form into the compact one, in place: kept rows and their places. Returns `model`.

    Rows over the share `keep` are pruned by magnitude, with a warning.

    Args:
        model: a decomposed model, or any module that holds `LoSparseLinear` layers.
        keep: None for the share that was asked for when the experts were decomposed; all kept rows of other modules.

    Raises:
        ValueError: the model has no weight in the training form, or `keep` is no share.
    """
    compact_layers(model, keep)
    if isinstance(model, PreTrainedModel) and _entries(model):
        _renew_costs(model)
    return model


@torch.no_grad()
def compact_layers(model: nn.Module, keep: float | None = None) -> None:
    """Do what `compact` does, but for the record: it is written once, when all is done."""
    if keep is not None and not 0 <= keep <= 1:
        raise ValueError(f"keep={keep!r} must be a share in [0, 1].")
    entries = _entries(model)
    kept = final_rows(model, (entries or {}).get("keep") if keep is None else keep)
    if not kept:
        raise ValueError("The model holds no low rank + sparse weight in its training form; decompose_experts first.")
    for path, module in list(low_rank_modules(model)):
        for name, entry in list(module.low_rank.items()):
            if entry["kept_rows"] is None:
                compact_weight(module, name, kept[f"{path}.{name}"])
    if isinstance(model, PreTrainedModel) and entries:
        write_description(model)


def compact_weight(module: Any, name: str, kept: torch.Tensor) -> None:
    """Turn S of a module's weight from the training form into the compact one, with the rows `kept` bool [*, out]."""
    s = getattr(module, f"{name}_s")
    values, rows, counts = compact_rows(SparsePart(s, kept), kept)
    setattr(module, f"{name}_s", nn.Parameter(values, s.requires_grad))
    delattr(module, f"{name}_kept")
    module.register_buffer(f"{name}_rows", rows)
    module.low_rank = {**module.low_rank, name: {**module.low_rank[name], "kept_rows": counts}}


@torch.no_grad()
def decompose_container(experts: Any, rank: int, keep: float, inputs: LayerInputs) -> None:
    """Turn the stored experts of one layer, in place, into low rank + sparse, in the compact form.

    Args:
        experts: a container of dense experts.
        inputs: what they see, with stored experts as picks.
    """
    decompose_compactly(experts, {"W_in": rank, "W_out": rank}, LoSparseConfig(rank=rank, keep=keep), inputs)


@torch.no_grad()
def decompose_compactly(experts: Any, ranks: dict[str, int], config: LoSparseConfig, inputs: LayerInputs) -> None:
    """Do what `decompose_container` does, with ranks of "W_in" and "W_out"; what has none stays dense."""
    _decompose_layer(experts, ranks, config, inputs, True, iter)
    if ranks:
        compact_layers(experts)


def low_rank_step(model: PreTrainedModel, config: LoSparseConfig) -> Step | None:
    """Return what the record tells of a decomposition on calibration data; None where all experts stayed dense."""
    ranks = sorted({entry["rank"] for _, module in low_rank_modules(model) for entry in module.low_rank.values()})
    if not ranks:
        return None
    lines = [
        f"Each matrix of a stored expert is held as `U V + S` (MC-SMoE): ranks {ranks}, and the share {config.keep} "
        "of S",
        "(hidden units: rows of the first matrix, columns of the second). The factors err least on the calibration "
        "data;",
        "no dense matrix is kept or rebuilt.",
    ]
    return Step(LOW_RANK, config.to_dict(), lines)


def _renew_costs(model: PreTrainedModel) -> None:
    """Let the model's record tell what it holds now."""
    attach_record(model, record_of(model).with_present_costs(saved_costs(model)))


def _entries(model: nn.Module) -> dict[str, Any] | None:
    """Return `config.mcsmoe` of a compressed model; None for other modules."""
    return compression(model) if isinstance(model, PreTrainedModel) else None


def _chosen_layers(layers: Layers, config: LoSparseConfig) -> Layers:
    """Return which layers are to be decomposed: merged ones, and those the merge kept whole."""
    mcsmoe = _entries(layers.model)
    if not mcsmoe:
        raise ValueError(
            "The model is not compressed: merge its experts first, with `compress` or `merge_experts` "
            "(MergeConfig(experts=1.0) keeps all of them)."
        )
    if any(low_rank_modules(layers.model)):
        raise ValueError("The model's experts are decomposed already; decompose the merged model instead.")
    if any(True for _ in quantized_modules(layers.model)):
        raise ValueError(
            "The model's experts are in few bits, which cannot be decomposed: decompose the model that it was "
            "made of, and quantize the result (`compress` does both in this order)."
        )
    known = [layer for layer in layers if layer.merged or layer.name in mcsmoe.get("whole", [])]
    chosen = layers_to_decompose(layers.only(known), config.skip)
    for layer in chosen:
        if any(parameter.is_meta for _, parameter in layer.parameters):
            raise ValueError(f"The experts of {layer.name} are offloaded; load the merged model onto one device.")
    return chosen


class _Count:
    """Counts matrices, and tells of each."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def tell(self, layer: str) -> None:
        if self.progress:
            self.progress(layer, self.done, self.total)

    def over(self, layer: str, parts: Iterable[Part]) -> Iterator[Part]:
        """Yield the parts of a layer; each counts once it is done with."""
        for part in parts:
            yield part
            self.done += 1
            self.tell(layer)


def _matrix(experts: Any, name: str, expert: int) -> torch.Tensor:
    """Return one expert's dense weight as [out, in]."""
    weight = getattr(experts, name).detach()[expert]
    return weight.mT if experts.is_transposed else weight


def _decompose_layer(
    experts: Any,
    ranks: dict[str, int],
    config: LoSparseConfig,
    inputs: LayerInputs | None,
    prune: bool,
    counted: Callable[[Iterable[Part]], Iterator[Part]],
) -> None:
    """Decompose one layer's experts: W_in, then W_out against the hidden states that are left of it."""
    first, second = "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"
    ranks = {name: ranks[part] for part, name in (("W_in", first), ("W_out", second)) if part in ranks}
    weights = {
        name: [_matrix(experts, name, expert).clone() for expert in range(experts.num_experts)] for name in ranks
    }
    tokens = None if inputs is None else _tokens(experts, inputs)
    before = _hidden(experts, tokens) if tokens and second in ranks else []
    if first in ranks:
        parts = _weighed(weights[first], tokens, row_importance(experts, tokens)) if tokens else _plain(weights[first])
        _install(experts, first, ranks[first], counted(parts), config, prune)
    if second in ranks:
        after = _hidden(experts, tokens) if tokens else []
        parts = _fitted(weights[second], before, after, prune) if tokens else _plain(weights[second])
        _install(experts, second, ranks[second], counted(parts), config, prune)


def _plain(weights: list[torch.Tensor]) -> Iterator[Part]:
    """Yield the parts without calibration data."""
    yield from ((weight, None, None) for weight in weights)


def _weighed(
    weights: list[torch.Tensor], tokens: list[tuple[torch.Tensor, torch.Tensor]], importance: list[torch.Tensor]
) -> Iterator[Part]:
    """Yield the parts of W_in, on the inputs times the gates."""
    for weight, (states, gates), counts in zip(weights, tokens, importance, strict=True):
        yield weight, _cross(states * gates, states * gates), counts


def _fitted(
    weights: list[torch.Tensor], before: list[torch.Tensor], after: list[torch.Tensor], prune: bool
) -> Iterator[Part]:
    """Yield the parts of W_out; with `prune` fitted to make of the hidden states `after` what it made of `before`."""
    for weight, old, new in zip(weights, before, after, strict=True):
        moment = _cross(new, new)
        yield refit_output(weight, _cross(old, new), moment) if prune else weight, moment, None


def _install(experts: Any, name: str, rank: int, parts: Iterable[Part], config: LoSparseConfig, prune: bool) -> None:
    """Store a stacked weight as factors; S is all that U V lacks, or with `prune` only some of its rows."""
    experts = decomposable(experts)
    columns = name in experts.sparse_columns
    number = round(config.keep * experts.dense_shape(name)[2 if columns else 1])
    experts.install_low_rank(name, rank, None)
    for expert, (weight, moment, importance) in enumerate(parts):
        if not prune:
            u, v = FACTORISATION[config.factorisation](weight, rank, moment, importance)
            u, v = u.to(weight.dtype), v.to(weight.dtype)
            set_factors(experts, name, expert, u, v, weight.float() - u.float() @ v.float())
            continue
        if columns:
            u, v, s, kept = split_columns(weight, rank, number, moment, config.factorisation)
        else:
            u, v, kept = split(weight, rank, number, moment, importance, config.factorisation)
            u, v = u.to(weight.dtype), v.to(weight.dtype)
            s = (weight.float() - u.float() @ v.float()) * kept[:, None]
        set_factors(experts, name, expert, u, v, s)
        getattr(experts, f"{name}_kept")[expert] = kept


def set_factors(experts: Any, name: str, expert: int, u: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> None:
    """Write one expert's factors of a weight in its training form: `u` [out, R], `v` [R, in], `s` [out, in]."""
    for part, value in (("u", u), ("v", v), ("s", s.mT if name in experts.sparse_columns else s)):
        getattr(experts, f"{name}_{part}").data[expert].copy_(value)


def _tokens(experts: Any, inputs: LayerInputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return per merged expert the inputs [n, D] that reach it and their gates [n, 1]."""
    index, weights = merge_picks(inputs.index, inputs.weights, experts.num_experts)
    device, picked = next(experts.parameters()).device, [index == expert for expert in range(experts.num_experts)]
    chosen = [(inputs.hidden[here.any(-1)], weights[here][:, None]) for here in picked]
    return [(states.to(device), gates.to(device)) for states, gates in chosen]


def _hidden(experts: Any, tokens: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Return per merged expert its hidden states [n, F] times the gates: a token counts as much as its output does."""
    matrices = unstacked(experts)
    return [expert_hidden(experts, states, expert, matrices) * gates for expert, (states, gates) in enumerate(tokens)]


def row_importance(experts: Any, tokens: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Return per merged expert what an error of each row of W_in counts in the layer's output, to first order.

    That of row i, which moves a hidden state j, is `||W_out e_j||^2 E[(gate dh_j / d(W_in x)_i)^2]`, as [out]: rows of
    units that are seldom active, or that W_out hardly reads, can err.
    """
    found, matrices = [], unstacked(experts)
    for expert, (states, gates) in enumerate(tokens):
        reads = _matrix(experts, "down_proj", expert).float().norm(dim=0)
        with torch.enable_grad():
            inner = expert_inner(experts, states, expert, matrices).float().detach().requires_grad_(True)
            read = (activated(experts, inner) * reads * gates).sum()
        found.append(torch.autograd.grad(read, inner)[0].square().sum(0) / max(len(states), 1))
    return found


def _cross(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `E[x y^T]` [D, D'] of `left` [n, D] and `right` [n, D']."""
    return (left.float().mT @ right.float()).double() / max(len(left), 1)
