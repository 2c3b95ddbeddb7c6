"""Experts pruned while a model learns: those that training batches use least go, by a schedule (arXiv 2206.00277)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_mcsmoe.attached import attach_record, record_of
from hf_mcsmoe.calibration.collect import counted_tokens
from hf_mcsmoe.distillation.pruned_students import prune_layer
from hf_mcsmoe.distillation.trainable import student_of
from hf_mcsmoe.files import read_json, replaced, write_json
from hf_mcsmoe.layers.batches import mask_of, token_masks
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.low_rank.pruning import kept_share
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.methods.pruning import keeping_order
from hf_mcsmoe.methods.registry import method_name
from hf_mcsmoe.methods.routed import Routed
from hf_mcsmoe.methods.saliency import SALIENCY
from hf_mcsmoe.methods.statistics import STATISTICS, with_tokens
from hf_mcsmoe.methods.view import Sums
from hf_mcsmoe.modeling.pruned_mcsmoe import cut_limits
from hf_mcsmoe.plan import LayerPlan, MergePlan, provenance
from hf_mcsmoe.record import Step

STATE_FILE, OPTIONS_FILE = "expert_pruning.safetensors", "expert_pruning.json"
PAPER = "2206.00277"


def experts_left(step: int, total: int, counts: tuple[int, int], start: int, end: int, unit: int = 1) -> int:
    """Return how many experts a layer has after `step` of `total` steps, by the cubic schedule of `kept_share`.

    Args:
        counts: before and in the end.
        start: steps before the first one goes.
        end: steps after the last one went.
        unit: what the number is a multiple of, rounded up.
    """
    before, after = counts
    share = kept_share(step, total, after / before, start, end)
    return max(after, unit * math.ceil(share * before / unit - 1e-9))


class ExpertPruningCallback(TrainerCallback):
    """Prunes the experts that training batches use least, along a schedule, while a Trainer trains in one process.

    For a model that `prepare_pruning` made. What an expert is worth is summed over the tokens of the training batches
    since experts went last, padding left out, and judged by a saliency that needs no gradients, by default the
    weights that routers gave it. Every layer keeps as many, of each group of a router alike. In the end the model is a
    pruned one like any other. Its checkpoints are resumed by the trainers of this package.
    """

    def __init__(
        self,
        experts: int | float = 0.5,
        *,
        saliency: str | Callable = "gate",
        start: int | float = 0.04,
        end: int | float = 0.16,
        every: int = 1,
        skip: Sequence[str] = (),
    ) -> None:
        """Make a callback.

        Args:
            experts: how many each layer keeps, or which share of them.
            saliency: a name, or a callable; what it reads is summed in every training step.
            start: steps (int) or share of training (float) before the first expert goes.
            end: steps or share at the end in which none goes any more.
            every: steps between two prunings at least.
            skip: patterns of the names of layers that stay whole, as in `prepare_pruning`.

        Raises:
            ValueError: a number out of range, or a saliency that is unknown, or reads gradients or no tokens.
        """
        self.config = MergeConfig(
            experts=experts, reduce="prune", budget="uniform", saliency=saliency, skip=tuple(skip)
        )
        self.names = with_tokens(SALIENCY.needs(saliency))
        for name in self.names:
            if STATISTICS.find(name).gradients or not STATISTICS.find(name).from_data:
                raise ValueError(
                    f"saliency={method_name(saliency)!r} reads {name!r}, which the forward of a training step does "
                    "not tell: choose gate, frequency or contribution."
                )
        if every < 1:
            raise ValueError(f"every={every!r} must be a positive number of steps.")
        self.start, self.end, self.every = start, end, every
        self.sums: dict[str, Sums] = {}
        self.tokens: dict[str, int] = {}
        self.last = 0
        # What the result's plan tells of the model that it began with, and the options of a run that goes on.
        self.origin: dict[str, Any] = {}
        self.written: dict[str, Any] = {}
        self._resumed_at: int | None = None
        self._handles: list[RemovableHandle] = []
        self._masks: dict[str, torch.Tensor] = {}

    def options(self, total: int) -> dict[str, Any]:
        """Return what must not change when a run is resumed.

        Raises:
            ValueError: the schedule is longer than the training.
        """
        start, end = self._steps(total)
        told = {"experts": self.config.experts, "saliency": method_name(self.config.saliency or "")}
        return {**told, "start": start, "end": end, "every": self.every, "total": total}

    def _steps(self, total: int) -> tuple[int, int]:
        start, end = (round(value * total) if isinstance(value, float) else value for value in (self.start, self.end))
        if min(start, end) < 0 or start + end >= total:
            raise ValueError(
                f"The schedule's start ({start}) and end ({end}) leave none of the {total} training steps to prune "
                "in: train longer, or lower them."
            )
        return start, end

    def take_up(self, folder: Path, model: PreTrainedModel) -> None:
        """Prune a model, before its weights are loaded, as far as that of a checkpoint was, and take up its sums.

        Raises:
            ValueError: the checkpoint was written without this callback.
        """
        if not (folder / OPTIONS_FILE).is_file() or not (folder / STATE_FILE).is_file():
            raise ValueError(
                f"{folder} was not written by a run that prunes experts: resume without the ExpertPruningCallback, or "
                "start anew."
            )
        state = read_json(folder / OPTIONS_FILE, "name another checkpoint")
        kept = {name: item["kept"] for name, item in read_json(folder / "config.json", "")["mcsmoe"]["layers"].items()}
        for layer in self._layers(model):
            own = list(layer.kept or ())
            places = [place for place, expert in enumerate(own) if expert in kept.get(layer.original_name, own)]
            if len(places) < len(own):
                prune_layer(model, layer.name, places)
        self.last, self.tokens, self._resumed_at = state["last"], state["tokens"], state["step"]
        self.written, self.origin = state["options"], state["origin"]
        self.sums = _sums_of(load_file(folder / STATE_FILE))

    def _layers(self, model: PreTrainedModel) -> list[MoELayer]:
        return [layer for layer in Layers.of(model) if layer.kept is not None]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check model, processes and schedule, and begin to count.

        Raises:
            ValueError: a model that is not prepared, several processes, or another schedule than a checkpoint's.
        """
        if isinstance(model, PeftModel) or not isinstance(model, PreTrainedModel) or not self._layers(model):
            raise ValueError(
                "Experts are pruned of a model that prepare_pruning was called for, not of one with adapters or "
                "inside another module: prepare it, and train it without adapters in one process."
            )
        if args.world_size > 1 or args.n_gpu > 1 or args.load_best_model_at_end:
            raise ValueError(
                "Experts are pruned in one process on one device, and the last state is the result: start one "
                "process, and leave out load_best_model_at_end."
            )
        options = self.options(state.max_steps)
        for layer in self._layers(model):
            least, unit = cut_limits(model, layer.name)
            if not least <= self._goal(layer, unit) <= layer.num_original or self._goal(layer, unit) % unit:
                raise ValueError(
                    f"experts={self.config.experts} leaves {self._goal(layer, unit)} of the {layer.num_original} "
                    f"experts of {layer.name}, whose router needs {least} of them at least, a multiple of {unit}."
                )
        if state.global_step and self._resumed_at != state.global_step:
            raise ValueError(
                f"The run goes on at step {state.global_step}, and its sums were not read: resume with a trainer of "
                "this package (DistillationTrainer), which takes them up."
            )
        if state.global_step and self.written != options:
            changed = ", ".join(
                f"{name} {self.written.get(name)} -> {value}"
                for name, value in options.items()
                if self.written.get(name) != value
            )
            raise ValueError(f"The checkpoint's schedule is another one ({changed}): resume with the same.")
        if not state.global_step:
            self.sums, self.tokens, self.last = {}, {}, 0
            self.origin = provenance(Layers.of(model), {}, self.config)
            self.origin["model_type"] = record_of(model).base.model_type
        self._watch(model)

    def _watch(self, model: PreTrainedModel) -> None:
        """Sum over what the layers see in every forward of a training step."""
        self._unwatch()

        def take_masks(module: Any, arguments: tuple, keywords: Mapping[str, Any]) -> None:
            self._masks = token_masks(model, keywords)

        self._handles.append(model.register_forward_pre_hook(take_masks, with_kwargs=True))
        for layer in self._layers(model):
            self._handles += layer.routed(partial(self._add, model, layer))

    def _unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _add(self, model: PreTrainedModel, layer: MoELayer, routed: Routed) -> None:
        if not model.training:
            return
        routed = counted_tokens(routed, mask_of(layer, self._masks, len(routed.logits)))
        sums = self.sums.setdefault(layer.original_name, Sums())
        with torch.no_grad():
            for name in self.names:
                sums.add(name, STATISTICS.find(name).function(routed).cpu())
        self.tokens[layer.original_name] = self.tokens.get(layer.original_name, 0) + len(routed.logits)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Prune what the schedule says of this step; the optimizer goes on with what is left."""
        start, end = self._steps(state.max_steps)
        step, is_last = state.global_step, state.global_step >= state.max_steps - end
        if not is_last and step - self.last < self.every:
            return
        wanted = {}
        for layer in self._layers(model):
            _, unit = cut_limits(model, layer.name)
            counts = (layer.num_original, self._goal(layer, unit))
            left = experts_left(step, state.max_steps, counts, start, end, unit)
            if left < layer.num_experts:
                wanted[layer] = left, unit
        for layer, (left, unit) in wanted.items():
            prune_layer(model, layer.name, self._staying(layer, left, unit), kwargs.get("optimizer"))
        if wanted:
            self.sums, self.last = {}, step
            self._watch(model)

    def _goal(self, layer: MoELayer, unit: int) -> int:
        experts = self.config.experts
        return experts if isinstance(experts, int) else max(1, round(experts * layer.num_original / unit)) * unit

    def _staying(self, layer: MoELayer, left: int, unit: int) -> list[int]:
        """Return the places of the experts of a layer that matter most, rising."""
        with layer.view(self.sums[layer.original_name], self.config.seed) as view:
            scores = SALIENCY[self.config.saliency or ""](view)
        return sorted(keeping_order(scores, unit)[: left // unit].flatten().tolist())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Stop counting, and let the record say which experts are left."""
        self._unwatch()
        model = student_of(model)
        layers = Layers.of(model)
        tokens = dict.fromkeys([layer.original_name for layer in layers], 0) | self.tokens
        plan = _plan(layers, {**self.origin, "tokens": tokens}).to_dict()
        attach_record(model, replace(record_of(model), plan=plan).with_step(self._step(state.max_steps)))

    def _step(self, total: int) -> Step:
        options = self.options(total)
        lines = [
            f"Experts were pruned while the model learned, from step {options['start']} to {total - options['end']} "
            f"of {total}: those of the smallest {options['saliency']} over the training batches since some went last",
            f"([task-specific pruning](https://arxiv.org/abs/{PAPER})).",
        ]
        return Step("Task-specific pruning", options, lines)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the sums and the schedule into the checkpoint."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            named = {f"{layer}|{name}": value for layer, sums in self.sums.items() for name, value in sums.items()}
            with replaced(folder / STATE_FILE) as new:
                save_file({name: value.contiguous() for name, value in named.items()}, new)
            told = {"options": self.options(state.max_steps), "step": state.global_step, "last": self.last}
            write_json(folder / OPTIONS_FILE, {**told, "tokens": self.tokens, "origin": self.origin})


def _sums_of(named: Mapping[str, torch.Tensor]) -> dict[str, Sums]:
    found: dict[str, Sums] = {}
    for key, value in named.items():
        layer, _, name = key.rpartition("|")
        found.setdefault(layer, Sums())[name] = value
    return found


def _plan(layers: Layers, told: dict[str, Any]) -> MergePlan:
    """Return the plan that the layers are what it leads to."""
    plans = {
        layer.original_name: LayerPlan.pruned(layer.num_original, list(layer.kept or range(layer.num_original)))
        for layer in layers
    }
    return MergePlan(plans, told)
