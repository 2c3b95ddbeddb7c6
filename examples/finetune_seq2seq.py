"""Fine-tune an encoder-decoder Mixture-of-Experts model on a task, before it is merged (step 1 of the recipe).

    python examples/finetune_seq2seq.py --model_name_or_path google/switch-base-32 --task copa --output_dir full
    accelerate launch examples/finetune_seq2seq.py ...

Batch size and learning rate are the paper's for the task unless given. The rows for evaluation are used once, at the
end; to choose among checkpoints keep a part of the training rows: --holdout 0.05 --eval_strategy epoch
--load_best_model_at_end true.
"""

from recipe import TaskArguments, evaluate, load, parse, train, trainer_data
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments


def main() -> None:
    """Fine-tune, save and evaluate."""
    arguments, training = parse((TaskArguments, Seq2SeqTrainingArguments), __doc__ or "")
    model, tokenizer, data = load(arguments, training)
    trainer = Seq2SeqTrainer(model=model, args=training, **trainer_data(data, model, tokenizer, arguments))
    train(trainer)
    trainer.save_model()
    evaluate(model, tokenizer, data, arguments, training.per_device_eval_batch_size, training.output_dir)


if __name__ == "__main__":
    main()
