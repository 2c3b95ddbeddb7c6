"""Experts that go while a model is distilled, and students that are ordinary models of their family."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from hf_mcsmoe.cli.options import described, parse_experts
from hf_mcsmoe.cli.preset import load_trained
from hf_mcsmoe.distillation import DistillationOptions
from hf_mcsmoe.distillation.expert_pruning import ExpertPruningCallback
from hf_mcsmoe.distillation.pruned_students import prepare_pruning, recall_pruning
from hf_mcsmoe.methods.config import option_help
from hf_mcsmoe.modeling.auto import compression
from hf_mcsmoe.modeling.saving_mcsmoe import PLAN_FILE, RECORD_FILE
from hf_mcsmoe.plan import MergePlan
from hf_mcsmoe.presets import TRAINED


@dataclass(frozen=True)
class Fewer:
    """Which experts go while the model is trained."""

    preset: str | None = described(
        None,
        f"a published combination that trains, with --experts; options beside it override its own: "
        f"{', '.join(TRAINED)}",
        metavar="NAME",
        is_eager=True,
        callback=load_trained,
    )
    experts: str | None = described(None, "with --preset task-specific: " + option_help("experts"))

    def check(self) -> None:
        """Raise ValueError where one of the two options is given alone."""
        if (self.preset is None) != (self.experts is None):
            given, lacking = ("preset", "experts") if self.preset else ("experts", "preset")
            raise ValueError(
                f"--{given} {vars(self)[given]} goes with --{lacking}: give both, as --preset task-specific --experts "
                "0.5."
            )

    def callback(self, start: float, end: float, steps: int) -> ExpertPruningCallback | None:
        """Return what prunes experts in a training of so many steps; None where none go.

        Raises:
            ValueError: no number, or a schedule that leaves no step to prune in.
        """
        if self.experts is None:
            return None
        made = ExpertPruningCallback(parse_experts(self.experts), start=start, end=end)
        made.options(steps)
        return made


def check_together(fewer: Fewer, rank: int | None, distillation: DistillationOptions) -> None:
    """Raise ValueError where options do not go with experts that are pruned while a model learns."""
    fewer.check()
    if fewer.preset is None:
        return
    wrong = {
        f"--rank {rank}": rank is not None,
        f"--train-parts {distillation.train_parts}": distillation.train_parts == "lora",
        f"--expert-weight {distillation.expert_weight}": distillation.expert_weight > 0,
    }
    if found := [option for option, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(
            f"{found[0]} needs experts that stay, and --preset {fewer.preset} prunes some while the model learns: "
            "leave it out, and distil the result with it."
        )


def as_student(name: str, model: PreTrainedModel, *, is_original: bool) -> PreTrainedModel:
    """Return a model as one that can be trained on: an original whose experts are to go, or a plain pruned one.

    Raises:
        ValueError: experts are to go from a model that is compressed already, or see `check_request`.
    """
    folder = Path(name)
    is_plain = not compression(model) and (folder / RECORD_FILE).is_file() and (folder / PLAN_FILE).is_file()
    if is_original and (compression(model) or is_plain):
        raise ValueError(f"{name} is compressed already, and has lost the experts to choose among: name the original.")
    if is_original:
        return prepare_pruning(model)
    plans = MergePlan.load(folder / PLAN_FILE).layers if is_plain else {}
    if any(plan.kept is None and not plan.is_whole for plan in plans.values()):
        raise ValueError(
            f"{name} is a merged model that was exported as a plain checkpoint, which no longer knows its groups: "
            "distil the merged model, and export the result."
        )
    return recall_pruning(model, plans) if is_plain else model
