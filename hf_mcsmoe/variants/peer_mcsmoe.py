"""Many experts of one neuron each, retrieved by product keys (PEER). This file travels with its checkpoints.

N = n² experts, each a neuron `e_i(x) = act(u_i . x) v_i`. Each of h heads makes a query of a token, cut into two
halves that are compared with two sets of n sub-keys, which all heads share; an expert's score is the sum of the scores
of its two sub-keys. The K best of N are among the K² sums of the K best of each half, so 2 n products and no N find
them. The output is the sum over heads of the experts retrieved, weighed by a softmax over the K scores.

Source: He, Mixture of A Million Experts (2024, arXiv 2407.04153), section 2.
"""

import inspect
import math
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN

from hf_mcsmoe.variants.dense_mlps_mcsmoe import dense_mlps, matrix, projections
from hf_mcsmoe.variants.remote_mcsmoe import VariantModel, VariantModule, become, check_counts, generated_in
from hf_mcsmoe.variants.stacks_mcsmoe import block_path, stacks

# The argument, and the option of a configuration, by which a model returns what its routers say, and a loss of it.
ROUTER_LOGITS = "output_router_logits"


class PeerModel(VariantModel):
    """A model of which one layer's MLP, or block of experts, is a PEER layer."""

    prefix: ClassVar[str] = "Peer"

    def install(self: Any, **options: Any) -> None:
        """Put a PEER layer in the place of an MLP or of a block of experts.

        Raises:
            ValueError: there is none of the layouts known, no such layer, or it returns more than hidden states.
        """
        found, layer = feed_forwards(self), options.pop("layer")
        if not found:
            raise ValueError(
                f"{type(self).__name__} has no block of experts, and no MLP of the layouts that can be swapped "
                "(Llama's, Phi's, GPT-2's or GPT-NeoX's)."
            )
        if not -len(found) <= layer < len(found):
            raise ValueError(
                f"layer must be from {-len(found)} to {len(found) - 1}, for {len(found)} MLPs and blocks of experts "
                f"can be swapped, not {layer}."
            )
        path, width = found[layer]
        module = self.get_submodule(path)
        weight = next(module.parameters())
        if not weight.is_meta:
            _check_plain(module, torch.zeros(1, 4, width, dtype=self.dtype, device=weight.device))
        peer = PEERLayer(width, **options).to(weight.device, self.dtype)
        if not weight.is_meta:
            peer.init_weights(getattr(self.config.get_text_config(), "initializer_range", 0.02))
        parent, _, name = path.rpartition(".")
        setattr(self.get_submodule(parent), name, peer.train(module.training))
        arguments = inspect.signature(type(self).forward).parameters
        if ROUTER_LOGITS in arguments and all(block is peer for _, block in _blocks(self)):
            self.register_forward_pre_hook(_without_router_logits, with_kwargs=True)


class PEERLayer(VariantModule):
    """A layer of N single neurons, of which each of h heads retrieves K.

    Its memory is that of 2 N D weights of experts, n d of sub-keys (n² = N) and h d D of queries: with the defaults
    and D = 1024, 2.1 billion. A forward of T tokens reads the experts that it picks into 2 T h K D numbers, and
    the gradient of the experts is as large as they are.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int = 1024**2,
        heads: int = 8,
        top_k: int = 16,
        key_size: int = 128,
        query_batch_norm: bool = True,
        activation: str = "gelu",
    ) -> None:
        """Make the layer.

        Args:
            hidden_size: D.
            num_experts: N, a square.
            heads: h; so many times `top_k` neurons are active in a token.
            top_k: K, at most the root of N.
            key_size: d of a query, even; a sub-key has half.
            query_batch_norm: whether each of the h d numbers of a query is normalised, in training over all tokens of
                a batch, padding among them, and by running statistics after.
            activation: between u and v, by its name in Transformers.

        Raises:
            ValueError: a number is out of its range, or the activation is unknown.
        """
        super().__init__()
        side = _side(num_experts, heads, top_k, key_size)
        if activation not in ACT2FN:
            raise ValueError(f"Transformers knows no activation {activation!r}: take gelu or relu.")
        self.heads, self.top_k = heads, top_k
        self.act_fn = ACT2FN[activation]
        self.query = nn.Linear(hidden_size, heads * key_size, bias=False)
        self.query_norm = nn.BatchNorm1d(heads * key_size) if query_batch_norm else nn.Identity()
        self.keys = nn.Parameter(torch.empty(2, side, key_size // 2))
        self.experts = PEERExperts(num_experts, hidden_size)
        self.init_weights(0.02)

    def init_weights(self, std: float) -> None:
        """Draw the sub-keys, of about unit length, and the rest as the family draws its linear layers."""
        init.normal_(self.keys, mean=0.0, std=self.keys.shape[-1] ** -0.5)
        init.normal_(self.query.weight, mean=0.0, std=std)
        self.experts.init_weights(std)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Compute the experts retrieved, [..., D].

        Args:
            hidden_states: [..., D].
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, index = self.retrieve(tokens)
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(tokens.dtype)
        return self.experts(tokens, index, weights, self.act_fn).reshape(hidden_states.shape)

    def retrieve(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores and the numbers of the experts that each head picks, both [T, h, K].

        Args:
            tokens: [T, D].
        """
        queries = self.query_norm(self.query(tokens)).unflatten(1, (self.heads, -1))
        return product_key_top_k(queries, self.keys, self.top_k)


class PEERExperts(VariantModule):
    """Neurons: u in the rows of up_proj [N, D], v in those of down_proj [N, D]."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size))

    def init_weights(self, std: float) -> None:
        """Draw the neurons as the family draws its linear layers."""
        for weight in (self.up_proj, self.down_proj):
            init.normal_(weight, mean=0.0, std=std)

    def forward(self, tokens: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, act_fn: Any) -> torch.Tensor:
        """Return the weighted sum [T, D] of the neurons' outputs.

        Args:
            tokens: [T, D].
            index: [T, h, K].
            weights: [T, h, K].
        """
        picked = index.flatten(1)
        inner = act_fn((self.up_proj[picked] @ tokens[..., None])[..., 0]) * weights.flatten(1)
        return (inner[:, None] @ self.down_proj[picked])[:, 0]


def product_key_top_k(queries: torch.Tensor, keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest of the n² scores of each query, in falling order, and whose they are.

    Expert i n + j has the score `q1 . keys[0, i] + q2 . keys[1, j]`, q1 and q2 the halves of its query.

    Args:
        queries: [..., d].
        keys: [2, n, d / 2].
        k: at most n.

    Returns:
        Scores and numbers of experts, [..., k].
    """
    first, second = (half @ key.T for half, key in zip(queries.chunk(2, dim=-1), keys, strict=True))
    (rows, row_index), (columns, column_index) = first.topk(k, dim=-1), second.topk(k, dim=-1)
    sums = (rows[..., :, None] + columns[..., None, :]).flatten(-2)
    numbers = (row_index[..., :, None] * keys.shape[1] + column_index[..., None, :]).flatten(-2)
    scores, best = sums.topk(k, dim=-1)
    return scores, numbers.gather(-1, best)


def _blocks(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return the layers that have experts, and the block of each."""
    layers = [layer for _, stack in stacks(model) for layer in stack]
    return [(layer, layer.get_submodule(path)) for layer in layers if (path := block_path(layer))]


def _without_router_logits(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Ask no logits of routers where none is left, of which the family would make a loss."""
    return args, kwargs | {ROUTER_LOGITS: False}


def feed_forwards(model: PreTrainedModel) -> list[tuple[str, int]]:
    """Return where a model has its MLPs and blocks of experts, in the order of its layers, and D of each."""
    width = model.config.get_text_config().hidden_size
    widths = {mlp: matrix(projections(mlp)[1]).shape[1] for _, _, mlp in dense_mlps(model)}
    widths |= {block: width for _, block in _blocks(model)}
    found: list[tuple[str, int]] = []
    for path, module in model.named_modules():
        is_inside = bool(found) and path.startswith(f"{found[-1][0]}.")  # an expert that all tokens share
        if module in widths and not is_inside:
            found.append((path, widths[module]))
    return found


def swap_peer(
    model: PreTrainedModel,
    layer: int | None = None,
    *,
    num_experts: int = 1024**2,
    heads: int = 8,
    top_k: int = 16,
    key_size: int = 128,
    query_batch_norm: bool = True,
    activation: str = "gelu",
) -> PreTrainedModel:
    """Put a PEER layer in the place of one MLP or block of experts; changed in place, and returned.

    The layer is new: the model is to be trained. For its memory see `PEERLayer`; the defaults are the paper's.

    Args:
        layer: which of the MLPs and blocks of experts, from 0, or below 0 from the end; None for the middle one.
        num_experts: N, a square.
        heads: h; so many times `top_k` neurons are active in a token.
        top_k: K, at most the root of N.
        key_size: d, the width of a head's query, even.
        query_batch_norm: whether queries are normalised over the tokens of a batch, see `PEERLayer`.
        activation: of a neuron, by its name in Transformers.

    Raises:
        ValueError: a number is out of its range, the activation is unknown, or the model has neither a block of
            experts nor an MLP of Llama's, Phi's, GPT-2's or GPT-NeoX's layout.
    """
    layer = len(feed_forwards(model)) // 2 if layer is None else layer
    sizes = {"num_experts": num_experts, "heads": heads, "top_k": top_k, "key_size": key_size}
    become(model, PeerModel, {"layer": layer, **sizes, "query_batch_norm": query_batch_norm, "activation": activation})
    return model


def _side(num_experts: int, heads: int, top_k: int, key_size: int) -> int:
    """Return n, the root of the number of experts.

    Raises:
        ValueError: a number is out of its range.
    """
    side = math.isqrt(num_experts) if isinstance(num_experts, int) and num_experts > 0 else 0
    if side < 1 or side**2 != num_experts:
        raise ValueError(f"num_experts must be a square, such as 1024 * 1024, not {num_experts}.")
    if heads < 1 or not 1 <= top_k <= side:
        raise ValueError(
            f"Needs heads from 1 and top_k from 1 to {side}, the root of {num_experts} experts, not heads={heads} and "
            f"top_k={top_k}."
        )
    if key_size < 2 or key_size % 2:
        raise ValueError(f"key_size must be even, for a query is cut into halves, not {key_size}.")
    check_counts(heads=heads, top_k=top_k, key_size=key_size)
    return side


def _check_plain(module: nn.Module, hidden_states: torch.Tensor) -> None:
    with torch.no_grad():
        output = module(hidden_states)
    if not isinstance(output, torch.Tensor) or output.shape != hidden_states.shape:
        raise ValueError(
            f"{type(module).__name__} does not return hidden states alone, so no PEER layer can stand in its place: "
            "choose another layer, or a model of a family like Llama or Mixtral."
        )


def __getattr__(name: str) -> type[Any]:
    return generated_in((PeerModel,), name)
