"""Momentum across the depth of a Mixture-of-Experts model (MomentumSMoE). This file travels with its checkpoints.

The output of an SMoE block is taken for a step of descent, and the steps of the blocks before are carried on as
heavy-ball momentum: `m_l = mu m_{l-1} + gamma u_l` with `u_l = SMoE(x_l)`, and the block returns m_l instead of u_l.
The momentum travels from layer to layer beside the hidden states, in one tensor twice as wide: nothing is kept between
two forwards, gradients reach it through checkpoints of either kind, and devices are changed with the hidden states.

Source: Teo and Nguyen, MomentumSMoE (NeurIPS 2024, arXiv 2410.14574). There the models are trained from scratch with
x - m; a trained model adds its experts' output, so here it is x + m.
"""

import math
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from hf_mcsmoe.variants.remote_mcsmoe import VariantModel, become, check_counts, generated_in, subclass
from hf_mcsmoe.variants.stacks_mcsmoe import block_path, stacks

KINDS = ("momentum", "adam", "scale")
# Decay rates of Adam's moments, and what keeps its root from zero.
DECAYS, EPSILON = (0.9, 0.999), 1e-8
# What scales may be at most, or float32 does not hold what they scale.
LARGEST = 1e9
# Model types whose experts return rows of tokens, whose layers hand on several streams of hidden states, or whose
# model adds to the hidden states between two layers (Qwen3-VL-MoE's deepstack).
OTHERS = {
    *("llama4", "llama4_text", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "deepseek_v4", "glm5_next", "hy_v4"),
    *("qwen4_exp", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_omni_moe", "qwen3_omni_moe_thinker"),
}


class MomentumModel(VariantModel):
    """A model whose SMoE blocks carry momentum."""

    prefix: ClassVar[str] = "Momentum"

    def install(self: Any, **options: Any) -> None:
        """Give every stack of layers with SMoE blocks its momentum.

        Raises:
            ValueError: no layer has an SMoE block.
        """
        types = {module.config.model_type for module in self.modules() if isinstance(module, PreTrainedModel)}
        if other := types & OTHERS:
            raise ValueError(
                f"Layers of {min(other)} do not hand on hidden states [B, S, D] from one to the next and through "
                "their experts, so no momentum can travel beside them: add_momentum does not serve this family."
            )
        found = [stack for _, stack in stacks(self)]
        if not found:
            raise ValueError(
                f"{type(self).__name__} has no layers with a block of experts inside, so there is no momentum to add."
            )
        for stack in found:
            _install(stack, self.config.get_text_config().hidden_size, options)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.register_forward_hook(_trim_recorded)


class MomentumLayer(nn.Module):
    """Mixin of a layer: takes the momentum beside its hidden states, and hands it on."""

    prefix: ClassVar[str] = "MomentumLayerOf"
    # D.
    momentum_width: int
    # Where the SMoE block is in the layer; None where it has none.
    momentum_block: str | None
    # Whether a later layer needs the momentum.
    hands_on: bool

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer.

        Args:
            hidden_states: [B, S, D], or [B, S, 2 D] with the momentum behind; likewise what is returned (first).
        """
        hidden_states, momentum = hidden_states.tensor_split([self.momentum_width], dim=-1)
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.momentum_width:
            raise ValueError(
                f"{type(self).__name__} takes hidden states {list(hidden_states.shape)}, not [B, S, "
                f"{self.momentum_width}]: no momentum can travel beside them: add_momentum does not serve this family."
            )
        block: Any = self.get_submodule(self.momentum_block) if self.momentum_block else None
        if block is None:
            output = super().forward(hidden_states, *args, **kwargs)
        else:
            block.momentum = momentum if momentum.shape[-1] else None
            try:
                output = super().forward(hidden_states, *args, **kwargs)
                momentum = block.momentum
            finally:  # also where a checkpoint, recomputing, stops in the middle
                block.momentum = None
        if not self.hands_on:
            return output
        if isinstance(output, tuple):
            return torch.cat([output[0], momentum], dim=-1), *output[1:]
        return torch.cat([output, momentum], dim=-1)


class MomentumBlock(nn.Module):
    """Mixin of an SMoE block: returns the momentum in place of the experts' output."""

    prefix: ClassVar[str] = "MomentumBlockOf"
    # kind, mu, gamma, look_ahead, and depth: how many blocks come before.
    momentum_options: dict[str, Any]
    # [B, S, D], between the layer's call and the block's, and between the block's end and the layer's.
    momentum: torch.Tensor | None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the experts and the momentum.

        Args:
            hidden_states: [B, S, D].
        """
        look_ahead = self.momentum_options["look_ahead"]
        if look_ahead and self.momentum is not None:
            hidden_states = hidden_states + look_ahead * self.momentum
        output = super().forward(hidden_states, *args, **kwargs)
        step, others = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if step.shape != hidden_states.shape:
            raise ValueError(
                f"{type(self).__name__} takes {list(hidden_states.shape)} and returns {list(step.shape)}, so its "
                "output is no step of momentum: add_momentum does not serve this family."
            )
        changed, self.momentum = advance(self.momentum, step, **self.momentum_options)
        return changed if others is None else (changed, *others)


def advance(
    momentum: torch.Tensor | None,
    step: torch.Tensor,
    *,
    kind: str,
    mu: float,
    gamma: float,
    depth: int,
    adam_gamma: float = 1.0,
    **_: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a block returns, and the momentum that the next one takes, both [B, S, D].

    Args:
        momentum: m of the blocks before, [B, S, D]; None in the first.
        step: u, output of the experts, [B, S, D].
        depth: how many blocks came before.
    """
    new = gamma * step if momentum is None else mu * momentum + gamma * step
    if kind == "scale":
        scaled = step * (gamma * sum(mu**power for power in range(depth + 1)))
        return scaled, scaled
    if kind == "adam" and momentum is None:
        first, second = ((1 - decay) * step**power for power, decay in enumerate(DECAYS, start=1))
        return adam_gamma * first / torch.sqrt(second + EPSILON), new
    return new, new


def robust_constants(rho: float, smoothness: float, curvature: float) -> dict[str, float]:
    """Return `mu`, `gamma` and `look_ahead` of robust momentum, to be given to `add_momentum`.

    Args:
        rho: rate of convergence, from 1 - 1/sqrt(smoothness / curvature), the fastest, below 1, the most robust.
        smoothness: L of the objective whose gradient the experts stand for.
        curvature: its strong convexity, below L.

    Raises:
        ValueError: no such constants.

    Source: Cyrus, Hu, Van Scoy and Lessard, A Robust Accelerated Optimization Algorithm for Strongly Convex Functions
    (2018), section 2.
    """
    if not 0 < curvature < smoothness or not 1 - math.sqrt(curvature / smoothness) <= rho < 1:
        raise ValueError(
            f"Robust momentum needs 0 < curvature < smoothness and 1 - sqrt(curvature / smoothness) <= rho < 1, not "
            f"curvature={curvature}, smoothness={smoothness}, rho={rho}."
        )
    ratio, left = smoothness / curvature, (1 - rho) ** 2 * (1 + rho)
    gamma, mu = ratio * left / smoothness, ratio * rho**3 / (ratio - 1)
    return {"mu": mu, "gamma": gamma, "look_ahead": rho**3 / ((ratio - 1) * left)}


def add_momentum(
    model: PreTrainedModel,
    mu: float = 0.7,
    gamma: float = 1.0,
    *,
    kind: str = "momentum",
    look_ahead: float = 0.0,
    adam_gamma: float = 1.0,
) -> PreTrainedModel:
    """Let the SMoE blocks of a model carry momentum across depth; the model is changed in place, and returned.

    Without training this harms a trained model, the more the larger mu is: begin with mu=0, which changes nothing, and
    let `MomentumWarmup` raise it while the model is fine-tuned.

    Args:
        mu: share of the momentum that is carried on, from 0 below 1.
        gamma: scale of a block's own output.
        kind: "momentum"; "adam", whose first block returns its output over the root of its square, and whose others
            return the momentum of the outputs as they are, the first among them; "scale", a control without a memory:
            each block's output times what momentum of equal steps has grown to there.
        look_ahead: share of the momentum that is added to a block's input, of robust momentum (`robust_constants`);
            there to the input itself, here behind the norm before the block.
        adam_gamma: scale of what the first block of "adam" returns, and of nothing else.

    Raises:
        ValueError: a number is out of its range, the kind is unknown, the model has no layers with experts inside, or
            its layers hand on something else than hidden states [B, S, D].
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}.")
    _check_numbers(mu, gamma, look_ahead, adam_gamma)
    numbers = {"mu": mu, "gamma": gamma, "look_ahead": look_ahead, "adam_gamma": adam_gamma}
    become(model, MomentumModel, {"kind": kind, **numbers})
    return model


def set_momentum(model: nn.Module, **numbers: float) -> None:
    """Set `mu`, `gamma`, `look_ahead` or `adam_gamma` of a model that carries momentum, and of what is saved of it.

    Args:
        model: one that `add_momentum` changed, or one loaded, with adapters around it or not.

    Raises:
        ValueError: the model carries no momentum, or a number is out of its range.
    """
    blocks = [module for module in model.modules() if isinstance(module, MomentumBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} carries no momentum: call add_momentum first.")
    known = blocks[0].momentum_options
    new = {name: known[name] for name in ("mu", "gamma", "look_ahead", "adam_gamma") if name in known} | numbers
    _check_numbers(**new)
    for block in blocks:
        block.momentum_options |= new
    for module in model.modules():
        config: Any = module.config if isinstance(module, MomentumModel) else None
        if config is not None and "variant" in vars(config):  # which a stack's own copy lacks
            config.variant = {**config.variant, "options": {**config.variant["options"], **new}}


class MomentumWarmup(TrainerCallback):
    """Raises mu from 0 to its value over the first steps of a training."""

    def __init__(self, mu: float = 0.7, steps: int = 100) -> None:
        """Take the value that mu ends at, and the number of steps.

        Raises:
            ValueError: mu is not from 0 below 1, or steps is no whole number from 1 on.
        """
        _check_numbers(mu, 1.0, 0.0)
        check_counts(steps=steps)
        self.mu, self.steps = mu, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set mu for the step."""
        set_momentum(kwargs["model"], mu=self.mu * min(state.global_step / self.steps, 1.0))


def _check_numbers(mu: float, gamma: float, look_ahead: float, adam_gamma: float = 1.0) -> None:
    if not 0 <= mu < 1:
        raise ValueError(f"mu must be from 0 below 1, not {mu}: momentum would grow without end.")
    if not all(abs(scale) <= LARGEST for scale in (gamma, look_ahead, adam_gamma)):
        raise ValueError(
            f"gamma, look_ahead and adam_gamma must be from {-LARGEST:.0e} to {LARGEST:.0e}, not {gamma}, "
            f"{look_ahead} and {adam_gamma}."
        )


def _install(stack: nn.ModuleList, width: int, options: dict[str, Any]) -> None:
    """Re-class the layers of a stack from the first with experts to the last, and their blocks."""
    blocks = {index: path for index, layer in enumerate(stack) if (path := block_path(layer))}
    for index in range(min(blocks), max(blocks) + 1):
        layer: Any = stack[index]
        layer.__class__ = subclass(MomentumLayer, type(layer))
        layer.momentum_width, layer.momentum_block = width, blocks.get(index)
        layer.hands_on = index < max(blocks)
    for depth, (index, path) in enumerate(blocks.items()):
        block = cast(Any, stack[index].get_submodule(path))
        block.__class__ = subclass(MomentumBlock, type(block))
        block.momentum_options, block.momentum = {**options, "depth": depth}, None


def _trim_recorded(module: PreTrainedModel, args: Any, output: Any) -> Any:
    """Leave the hidden states that a model recorded of its layers without the momentum beside them."""
    width = module.config.get_text_config().hidden_size
    if type(output) is tuple:  # of return_dict=False, which has no names
        return tuple(_trimmed(states, width) if _are_states(states, width) else states for states in output)
    items = output.items() if isinstance(output, dict) else ()
    for name, states in items:
        if name.endswith("hidden_states") and isinstance(states, tuple):
            output[name] = _trimmed(states, width)
    return output


def _are_states(states: Any, width: int) -> bool:
    """Return whether these are hidden states of layers, of which the first are embeddings, [B, S, D]."""
    first = states[0] if isinstance(states, tuple) and states else None
    return isinstance(first, torch.Tensor) and first.dim() == 3 and first.shape[-1] == width


def _trimmed(states: tuple[Any, ...], width: int) -> tuple[Any, ...]:
    return tuple(state if state is None else state[..., :width] for state in states)


def __getattr__(name: str) -> type[Any]:
    return generated_in((MomentumModel, MomentumLayer, MomentumBlock), name)
