"""Fine-tune an encoder-decoder Mixture-of-Experts model on a task, before it is merged (step 1 of the recipe).

    python examples/finetune_seq2seq.py --model_name_or_path google/switch-base-32 --task copa --output_dir full
    accelerate launch examples/finetune_seq2seq.py ...

Batch size and learning rate are the paper's for the task unless given. The rows for evaluation are used once, at the
end; to choose among checkpoints keep a part of the training rows: --holdout 0.05 --eval_strategy epoch
--load_best_model_at_end true. The routers' own losses (balance of load, z) are part of the loss: without them
fine-tuning may send all tokens to a few experts, and merging the others shows nothing.
"""

from dataclasses import dataclass

from recipe import TaskArguments, evaluate, load, parse, trainer_data
from transformers import Seq2SeqTrainingArguments

from hf_mcsmoe.distillation.checkpoints import train_or_resume
from hf_mcsmoe.distillation.finetuning import FinetuneTrainer
from hf_mcsmoe.distillation.processes import mistakes_reported_once, shut_down_processes
from hf_mcsmoe.methods.config import option


@dataclass
class FinetuneArguments:
    """What counts in the loss."""

    router_losses: bool = option(True, "add the routers' balance and z losses, weighted as the model's config says")


def main() -> None:
    """Fine-tune, save and evaluate."""
    with mistakes_reported_once():
        classes = [TaskArguments, FinetuneArguments, Seq2SeqTrainingArguments]
        arguments, choice, training = parse(classes, __doc__ or "")
        model, tokenizer, data = load(arguments, training)
    given = trainer_data(data, model, tokenizer)
    trainer = FinetuneTrainer(model=model, args=training, router_losses=choice.router_losses, **given)
    train_or_resume(trainer)
    trainer.save_model()
    evaluate(data, model, tokenizer, training)
    shut_down_processes()


if __name__ == "__main__":
    main()
