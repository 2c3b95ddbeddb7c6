"""Merge the experts of a fine-tuned model, then let it learn from the original (M-SMoE, step 2 of the recipe).

    python examples/merge_and_distill.py --model_name_or_path full --task copa --num_groups 8 --output_dir merged
    accelerate launch examples/merge_and_distill.py ...

The fine-tuned model is merged and is the teacher as well. Defaults are the paper's; --num_train_epochs 0 merges only.
"""

from dataclasses import dataclass, field

from recipe import TaskArguments, calibration, evaluate, load, parse, trainer_data

import hf_mcsmoe as mc
from hf_mcsmoe.distillation.checkpoints import train_or_resume
from hf_mcsmoe.distillation.processes import made_by_first_process, mistakes_reported_once, shut_down_processes
from hf_mcsmoe.methods.config import option


@dataclass
class MergeArguments:
    """How experts are merged (paper, section 3.1)."""

    num_groups: int = option(8, "experts that a layer keeps, on average over merged layers")
    num_experts: int | None = option(None, "experts of a layer before; checked if given")
    skip: list[str] = field(default_factory=lambda: ["encoder.block.1.*"], metadata={"help": "layers left, or none"})
    num_samples: int = option(256, "training rows that guide the merge")
    merge_batch_size: int = option(16, "rows in a forward of the calibration")
    budget: str = option("adaptive", "how layers share the experts: adaptive or uniform")
    similarity: str = option("router_logits", "which experts belong together")
    alignment: str = option("weight_matching", "how neurons are aligned, or none")
    weighting: str = option("saliency", "weights of a group's members: saliency, uniform, or dominant, which prunes")
    repair: str = option("none", "fit merged layers to the original before training: none (paper), refit, local")


def main() -> None:
    """Merge, evaluate, distil, save and evaluate."""
    with mistakes_reported_once():
        classes = [TaskArguments, MergeArguments, mc.DistillationSeq2SeqArguments]
        arguments, choice, training = parse(classes, __doc__ or "")
        teacher, tokenizer, data = load(arguments, training, num_experts=choice.num_experts)
        methods = {name: vars(choice)[name] for name in ("budget", "similarity", "alignment", "weighting")}
        skipped = () if choice.skip == ["none"] else tuple(choice.skip)
        config = mc.MergeConfig(experts=choice.num_groups, skip=skipped, seed=training.seed, **methods)
        sampling = {"num_samples": choice.num_samples, "batch_size": choice.merge_batch_size, "seed": training.seed}
        batches = calibration(data, teacher, tokenizer, **sampling)
        repair, folder = mc.RepairConfig(method=choice.repair), f"{training.output_dir}/merged_once"
        model = made_by_first_process(lambda: mc.compress(teacher, batches, config, repair=repair), folder)
    evaluate(data, model, tokenizer, training, name="before_distillation")
    given = trainer_data(data, model, tokenizer)
    trainer = mc.DistillationSeq2SeqTrainer(model=model, teacher=teacher, args=training, **given)
    if training.num_train_epochs > 0:
        train_or_resume(trainer)
    trainer.save_model()
    evaluate(data, model, tokenizer, training)
    shut_down_processes()


if __name__ == "__main__":
    main()
