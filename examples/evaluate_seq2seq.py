"""Evaluate an encoder-decoder, compressed or not, on a task.

    python examples/evaluate_seq2seq.py --model_name_or_path merged --task copa

By generation: greedy, word for word, against all gold answers; or, for classification, by the likelihood of the labels
(--by likelihood).
"""

from dataclasses import dataclass, field

from accelerate import PartialState
from recipe import TaskArguments, check_processes, evaluate, leave, load_data, mistakes_told_once, parse

from hf_mcsmoe.layers.loading import load_model, load_tokenizer


@dataclass
class EvaluationArguments:
    """How to evaluate."""

    output_dir: str = field(default="out", metadata={"help": "folder for evaluation.json"})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "rows in a forward"})
    use_cpu: bool = field(default=False, metadata={"help": "evaluate on the CPU, in as many processes as there are"})
    dtype: str = field(default="auto", metadata={"help": "dtype to load in: auto, float32, bfloat16 ..."})


def main() -> None:
    """Load and evaluate."""
    with mistakes_told_once():
        arguments, options = parse((TaskArguments, EvaluationArguments), __doc__ or "")
        PartialState(cpu=options.use_cpu)
        check_processes()
        data = load_data(arguments, 0, train=False)
        tokenizer = load_tokenizer(arguments.model_name_or_path)
        model = load_model(arguments.model_name_or_path, dtype=options.dtype)
    evaluate(model, tokenizer, data, arguments, options.per_device_eval_batch_size, options.output_dir)
    leave()


if __name__ == "__main__":
    main()
