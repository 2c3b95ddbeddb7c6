"""Evaluate an encoder-decoder, compressed or not, on a task.

    python examples/evaluate_seq2seq.py --model_name_or_path merged --task copa

By generation: greedy, word for word, against all gold answers; or, for classification, by the likelihood of the labels
(--by likelihood).
"""

from dataclasses import dataclass

from accelerate import PartialState
from recipe import TaskArguments, evaluate, load_data, parse

from hf_mcsmoe.distillation.processes import check_processes, mistakes_reported_once, shut_down_processes
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.methods.config import option


@dataclass
class EvaluationArguments:
    """How to evaluate."""

    output_dir: str = option("out", "folder for evaluation.json")
    per_device_eval_batch_size: int = option(32, "rows in a forward")
    use_cpu: bool = option(False, "evaluate on the CPU, in as many processes as there are")
    dtype: str = option("auto", "dtype to load in: auto, float32, bfloat16 ...")


def main() -> None:
    """Load and evaluate."""
    with mistakes_reported_once():
        arguments, options = parse([TaskArguments, EvaluationArguments], __doc__ or "")
        PartialState(cpu=options.use_cpu)
        check_processes()
        data = load_data(arguments, 0, train=False)
        tokenizer = load_tokenizer(arguments.model_name_or_path)
        model = load_model(arguments.model_name_or_path, dtype=options.dtype)
    evaluate(data, model, tokenizer, options)
    shut_down_processes()


if __name__ == "__main__":
    main()
