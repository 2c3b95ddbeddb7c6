"""How many experts a token picks, of any MoE model: set, grown while it is trained, and tried one after the other.

SMoE-Dropout (arXiv 2303.01610): a model whose k grew can be served with any k.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hf_mcsmoe.variants.remote_mcsmoe import check_counts, own_configs

# How configurations and modules call k.
TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
TOP_K_ATTRIBUTES = ("top_k", "num_experts_per_tok")
# What Transformers calls the loss of the next token, which the first label of a row is not; None is the default.
NEXT_TOKEN = ("ForCausalLM", "ForConditionalGeneration", None)
COUNTS = ("num_experts", "n_routed_experts", "moe_num_experts", "num_local_experts")


def set_top_k(model: nn.Module, top_k: int) -> None:
    """Let every SMoE block of a model pick `top_k` experts, as the saved model will.

    Another model of the same configuration is left alone: this one has a copy of its own from here on.

    Raises:
        ValueError: the model has no blocks that pick by a number, or fewer experts can be picked.
    """
    places = list(_top_k_places(model))
    if not places:
        raise ValueError(f"{type(model).__name__} has no blocks whose number of experts a token can be set.")
    most = min(_most(block, module) for block, module, _ in places)
    if not 1 <= top_k <= most:
        raise ValueError(f"top_k must be from 1 to {most}, the experts that a token can get, not {top_k}.")
    check_counts(top_k=top_k)
    for _, module, name in places:
        setattr(module, name, top_k)
    for module in model.modules():  # heads, whose loss of load balancing goes by it
        if isinstance(module, PreTrainedModel):
            for name in vars(module).keys() & set(TOP_K_FIELDS):
                setattr(module, name, top_k)
    own_configs(model)
    for config in {id(config): config for config in _configs(model)}.values():
        for name in vars(config).keys() & set(TOP_K_FIELDS):
            setattr(config, name, top_k)
        variant = vars(config).get("variant")
        if variant and "top_k" in variant["options"]:
            config.variant = {**variant, "options": {**variant["options"], "top_k": top_k}}


def get_top_k(model: nn.Module) -> int:
    """Return how many experts a token gets in the first SMoE block of a model.

    Raises:
        ValueError: the model has no blocks that pick by a number.
    """
    for _, module, name in _top_k_places(model):
        return vars(module)[name]
    raise ValueError(f"{type(model).__name__} has no blocks whose number of experts a token can be set.")


def _top_k_places(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, str]]:
    """Yield blocks around experts, the modules that know k, these and in these, and what they call it."""
    for block in model.modules():
        if "experts" in dict(block.named_children()):
            for module in block.modules():
                yield from ((block, module, name) for name in TOP_K_ATTRIBUTES if type(vars(module).get(name)) is int)


def _most(block: nn.Module, router: nn.Module) -> float:
    """Return how many experts a router can pick: all, or those of the groups that a token may choose from."""
    known, experts = vars(router), block.get_submodule("experts")
    counts = [vars(module)[name] for module in (router, experts) for name in COUNTS if name in vars(module)]
    stacked = [len(parameter) for parameter in experts.parameters(recurse=False) if parameter.dim() == 3]
    listed = [len(experts)] if isinstance(experts, nn.ModuleList | nn.ModuleDict) else []
    count = next(iter(counts + listed + stacked), math.inf)
    groups, chosen = known.get("n_group") or known.get("num_group") or 1, known.get("topk_group") or 1
    return count if groups == 1 else count // groups * chosen


def _configs(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            config = module.config
            yield from (config, *(vars(config)[name] for name in config.sub_configs if vars(config).get(name)))


def _linear(share: float) -> float:
    return share


def _cosine(share: float) -> float:
    return (1 - math.cos(math.pi * share)) / 2


def _exponential(share: float) -> float:
    return 1 - 0.99 ** (300 * share)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
}


class ElasticTopK(TrainerCallback):
    """Lets k grow during a training, of a model that `moefy_dense` made or of any other Mixture-of-Experts model."""

    def __init__(self, k_min: int, k_max: int, schedule: str = "linear") -> None:
        """Take where k starts and ends, and how it grows.

        Args:
            schedule: "linear" and "cosine" in the share t / T of the steps; "exponential", fast at first, by
                1 - 0.99^(300 t / T), 95 % of the way; "multistep", doubled from `k_min` on, each for as long.

        Raises:
            ValueError: k would shrink or is no whole number, or the schedule is unknown.
        """
        if not 1 <= k_min <= k_max:
            raise ValueError(f"Needs 1 <= k_min <= k_max, not k_min={k_min} and k_max={k_max}.")
        check_counts(k_min=k_min, k_max=k_max)
        if schedule not in (*SCHEDULES, "multistep"):
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, multistep, not {schedule!r}.")
        self.k_min, self.k_max, self.schedule = k_min, k_max, schedule

    def k_at(self, step: int, steps: int) -> int:
        """Return k at a step of so many.

        Raises:
            ValueError: there are no steps, or the step is below 0.
        """
        if not 0 <= step < math.inf or not steps >= 1:
            raise ValueError(f"Needs a step from 0 on, of 1 or more, not step {step} of {steps}.")
        share = min(step / steps, 1.0)
        if self.schedule == "multistep":
            doublings = math.ceil(math.log2(self.k_max / self.k_min))
            return min(self.k_min * 2 ** min(int(share * (doublings + 1)), doublings), self.k_max)
        grown = (self.k_max - self.k_min) * SCHEDULES[self.schedule](share)
        return max(self.k_min, min(round(grown) + self.k_min, self.k_max))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse at once a k that the model cannot have."""
        set_top_k(kwargs["model"], self.k_max)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set k for the step."""
        k = self.k_at(state.global_step, state.max_steps)
        if k != get_top_k(kwargs["model"]):
            set_top_k(kwargs["model"], k)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the k that growth ends at, which the last step does not reach; it is what is saved from here on."""
        set_top_k(kwargs["model"], self.k_max)


@torch.no_grad()
def evaluate_k_sweep(
    model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], ks: Iterable[int]
) -> dict[int, float]:
    """Return the mean loss per label of a model with each k; its own k and mode are as they were afterwards.

    Args:
        batches: what the model is called with, `labels` among it, [B, S] of tokens or [B] of rows, -100 where a place
            has none; batches of such places alone are left out.
        ks: numbers of experts a token.

    Raises:
        ValueError: no batch, a batch without labels, labels of which none counts, or a k that the model cannot have.
    """
    given, before, training = list(batches), get_top_k(model), model.training
    if not given or any("labels" not in batch for batch in given):
        raise ValueError("evaluate_k_sweep needs batches with labels, and got one without, or none.")
    counted = [(batch, count) for batch in given if (count := _count_labels(model, batch["labels"]))]
    if not counted:
        raise ValueError("evaluate_k_sweep needs labels that count, and all of its batches have -100 alone.")
    losses = {}
    try:
        model.eval()
        for k in ks:
            set_top_k(model, k)
            losses[k] = _mean_loss(model, counted)
    finally:
        set_top_k(model, before)
        model.train(training)
    return losses


def _count_labels(model: PreTrainedModel, labels: torch.Tensor) -> int:
    """Return how many labels a loss is the mean of."""
    if labels.dim() > 1 and model.loss_type in NEXT_TOKEN and not model.config.is_encoder_decoder:
        labels = labels[:, 1:]  # the first label of a row is predicted by nothing
    return int((labels != -100).sum())


def _mean_loss(model: PreTrainedModel, batches: list[tuple[Mapping[str, torch.Tensor], int]]) -> float:
    # With the routers' logits the loss of load balancing would be added.
    has_routers = "output_router_logits" in vars(model.config.get_text_config())
    without: dict[str, Any] = {"output_router_logits": False} if has_routers else {}
    losses = [(float(model(**{**batch, **without}).loss), count) for batch, count in batches]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
