"""Compare ways to merge a model's experts on held-out text, without any training afterwards.

    python examples/benchmarks/compare_methods.py MODEL --data FILE --experts 12 8 4

Every other batch of the text calibrates, the rest evaluates. Figures: loss, and the divergence (KL, nats per token) of
the merged model's predictions from the original's, over the tokens that count.
"""

import argparse

import torch
from transformers import PreTrainedModel

from hf_mcsmoe import MergeConfig, collect_statistics, merge_experts, plan_merge
from hf_mcsmoe.data.calibration import calibration_batches
from hf_mcsmoe.data.features import T5_NOISE
from hf_mcsmoe.data.spans import SpanNoise
from hf_mcsmoe.data.text import read_samples
from hf_mcsmoe.layers.loading import load_model, load_tokenizer

METHODS: dict[str, dict] = {
    "M-SMoE (adaptive budget)": {},
    "M-SMoE, uniform budget": {"budget": "uniform"},
    "no alignment": {"alignment": "none"},
    "aligned to the first expert": {"reference": "first"},
    "uniform weights": {"weighting": "uniform"},
    "plain averaging": {"alignment": "none", "weighting": "uniform"},
    "random groups": {"similarity": "random"},
    "pruning to the dominant": {"weighting": "dominant"},
}

Batches = list[dict[str, torch.Tensor]]


@torch.no_grad()
def predictions(model: PreTrainedModel, batches: Batches) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return per batch the log-probabilities [N, V] of the tokens that count, and what they should have been [N]."""
    answers = []
    for batch in batches:
        logits = model(**batch).logits.float()
        if "labels" in batch:
            targets = batch["labels"]
        else:
            targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
            logits = logits[:, :-1]
        counted = targets != -100
        answers.append((logits[counted].log_softmax(-1), targets[counted]))
    return answers


def figures(
    model: PreTrainedModel, batches: Batches, reference: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[float]:
    """Return the loss and the divergence from `reference`, means over the tokens that count."""
    loss = divergence = 0.0
    tokens = sum(len(targets) for _, targets in reference)
    for (ours, targets), (theirs, _) in zip(predictions(model, batches), reference, strict=True):
        loss -= ours.gather(1, targets[:, None]).sum().item()
        divergence += (theirs.exp() * (theirs - ours)).sum().item()
    return [loss / tokens, divergence / tokens]


def main() -> None:
    """Print a markdown table: a row per method, loss and KL per number of experts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--data", required=True, help="text, as for `hf-mcsmoe compress`")
    parser.add_argument("--experts", type=int, nargs="+", default=[8], help="experts per layer on average")
    parser.add_argument("--num-samples", type=int, default=512, help="texts, half of them for calibration")
    parser.add_argument("--max-length", type=int, default=96, help="longest text in tokens")
    density, span = T5_NOISE.noise_density, T5_NOISE.mean_span
    parser.add_argument("--noise-density", type=float, default=density, help="share of a text masked, for T5's task")
    parser.add_argument("--mean-span", type=float, default=span, help="tokens in a masked span, on average")
    parser.add_argument("--fixed-spans", action="store_true", help="all masked spans equally long")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    options = {"num_samples": arguments.num_samples, "max_length": arguments.max_length, "batch_size": 16}
    noise = SpanNoise(arguments.noise_density, arguments.mean_span, arguments.fixed_spans)
    batches = calibration_batches(read_samples(arguments.data), tokenizer, model, noise=noise, **options)
    calibration, evaluation = batches[::2], batches[1::2]
    statistics = collect_statistics(model, calibration)
    reference = predictions(model, evaluation)
    print(f"original: loss {figures(model, evaluation, reference)[0]:.3f}\n")
    print("| method |" + "".join(f" {count}: loss | {count}: KL |" for count in arguments.experts))
    print("|---|" + "---:|---:|" * len(arguments.experts))
    for name, changes in METHODS.items():
        cells = []
        for count in arguments.experts:
            plan = plan_merge(model, statistics, MergeConfig(experts=count, **changes))
            loss, divergence = figures(merge_experts(model, plan), evaluation, reference)
            cells.append(f" {loss:.3f} | {divergence:.4f} |")
        print(f"| {name} |" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
