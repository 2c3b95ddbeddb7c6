"""Fine-tune an encoder-decoder Mixture-of-Experts model on a task, before it is merged (step 1 of the recipe).

    python examples/finetune_seq2seq.py --model_name_or_path google/switch-base-32 --task copa --output_dir full
    accelerate launch examples/finetune_seq2seq.py ...

Batch size and learning rate are the paper's for the task unless given. The rows for evaluation are used once, at the
end; to choose among checkpoints keep a part of the training rows: --holdout 0.05 --eval_strategy epoch
--load_best_model_at_end true.
"""

from typing import Any

import torch
from recipe import TaskArguments, evaluate, load, mistakes_told_once, parse, train, trainer_data
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_mcsmoe.losses import cross_entropy


def token_mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """Return the cross entropy, a mean over the labels of the accumulated batch of all processes.

    Switch's own loss is a mean over the labels of one process's part of it, which the Trainer takes for this one and
    scales up by the number of processes and of accumulation steps (Transformers 5.24).
    """
    total = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return cross_entropy(outputs.logits, labels) / total


def main() -> None:
    """Fine-tune, save and evaluate."""
    with mistakes_told_once():
        arguments, training = parse((TaskArguments, Seq2SeqTrainingArguments), __doc__ or "")
        model, tokenizer, data = load(arguments, training)
    trainer = Seq2SeqTrainer(
        model=model,
        args=training,
        compute_loss_func=None if training.label_smoothing_factor else token_mean,
        **trainer_data(data, model, tokenizer, arguments),
    )
    train(trainer)
    trainer.save_model()
    evaluate(model, tokenizer, data, arguments, training.per_device_eval_batch_size, training.output_dir)


if __name__ == "__main__":
    main()
