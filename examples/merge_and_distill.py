"""Merge the experts of a fine-tuned model, then let it learn from the original (M-SMoE, step 2 of the recipe).

    python examples/merge_and_distill.py --model_name_or_path full --task copa --num_groups 8 --output_dir merged
    accelerate launch examples/merge_and_distill.py ...

The fine-tuned model is merged and is the teacher as well. Defaults are the paper's: 8 experts a layer on average, the
first sparse layer left whole, frozen routers, KL of weight 0.2 at temperature 2; batch size and learning rate by task.
--num_train_epochs 0 merges only.
"""

from recipe import (
    MergeArguments,
    TaskArguments,
    calibration_samples,
    check_num_experts,
    evaluate,
    leave,
    load,
    made_once,
    mistakes_told_once,
    parse,
    train,
    trainer_data,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe import (
    DistillationSeq2SeqArguments,
    DistillationSeq2SeqTrainer,
    MergeConfig,
    RepairConfig,
    compress,
)
from hf_mcsmoe.data.text import calibration_batches


def merge(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: list[tuple[str, str | None]],
    choice: MergeArguments,
    max_length: int,
    seed: int,
) -> PreTrainedModel:
    """Return the merged copy of a model, guided by its routers on training rows."""
    config = MergeConfig(
        experts=choice.num_groups,
        skip=tuple(pattern for pattern in choice.skip if pattern != "none"),
        budget=choice.budget,
        similarity=choice.similarity,
        alignment=choice.alignment,
        weighting=choice.weighting,
        seed=seed,
    )
    sampling = {"num_samples": choice.num_samples, "max_length": max_length, "batch_size": choice.merge_batch_size}
    batches = calibration_batches(samples, tokenizer, teacher, **sampling, seed=seed)
    return compress(teacher, batches, config, repair=RepairConfig(method=choice.repair))


def main() -> None:
    """Merge, evaluate, distil, save and evaluate."""
    classes = (TaskArguments, MergeArguments, DistillationSeq2SeqArguments)
    with mistakes_told_once():
        arguments, choice, training = parse(classes, __doc__ or "")
        teacher, tokenizer, data = load(arguments, training)
        check_num_experts(teacher, choice.num_experts)
        max_length = arguments.max_source_length or data.task.max_source_length
        samples = calibration_samples(data)
        model = made_once(
            lambda: merge(teacher, tokenizer, samples, choice, max_length, training.seed), training.output_dir
        )
    batch_size, output_dir = training.per_device_eval_batch_size, training.output_dir
    evaluate(model, tokenizer, data, arguments, batch_size, output_dir, name="before_distillation")
    trainer = DistillationSeq2SeqTrainer(
        model=model, teacher=teacher, args=training, **trainer_data(data, model, tokenizer, arguments)
    )
    if training.num_train_epochs > 0:
        train(trainer)
    trainer.save_model()
    evaluate(model, tokenizer, data, arguments, batch_size, output_dir)
    leave()


if __name__ == "__main__":
    main()
