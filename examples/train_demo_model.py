"""Train the small Switch Transformer of the demo and write it, its task and its figures to `hf_mcsmoe/demo_assets`.

    python examples/train_demo_model.py --text ../shared/data/text/tinystories_4m_lowercased.txt.gz

The task: rewrite two or three words of a story, letter by letter, as a sign at the front says: reverse each word, put
the words in reverse order, shift each letter by three places, shift it back, restore the vowels or the spaces. Six
skills in one model give its experts something to divide among them.

Training starts with half of the experts; after a part of the steps each is split in two (sparse upcycling, as many
released models were made), which then train apart. Experts that share an ancestor are what merging is for; with those
that never had anything in common no method of merging works well at this size.
"""

import argparse
import gzip
import json
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from hf_mcsmoe.demo import ASSETS, batches, evaluate, rewriting

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHIFTED = LETTERS[3:] + LETTERS[:3]
FORWARD, BACKWARD = str.maketrans(LETTERS, SHIFTED), str.maketrans(SHIFTED, LETTERS)
LONGEST = 20
# The task of a rewriting, its source and its target, as `demo.rewriting` takes them.
Rewriting = dict[str, str]

# From a plain text to the source and the target of the task.
TASKS: dict[str, Callable[[str], tuple[str, str]]] = {
    "reverse": lambda text: (text, " ".join(word[::-1] for word in text.split())),
    "order": lambda text: (text, " ".join(text.split()[::-1])),
    "shift": lambda text: (text, text.translate(FORWARD)),
    "unshift": lambda text: (text.translate(FORWARD), text),
    "vowels": lambda text: (re.sub("[aeiou]", "", text), text),
    "spaces": lambda text: (text.replace(" ", ""), text),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="stories, gzipped, UTF-8")
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder to write")
    parser.add_argument("--steps", type=int, default=3600, help="training steps")
    parser.add_argument("--split-at", type=float, default=0.4, help="share of the steps before experts are split")
    parser.add_argument("--batch-size", type=int, default=48, help="examples per step")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--experts", type=int, default=8, help="experts per layer")
    parser.add_argument("--calibration-examples", type=int, default=240, help="examples shipped for calibration")
    parser.add_argument("--evaluation-examples", type=int, default=480, help="examples shipped for evaluation")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the examples")
    return parser.parse_args()


def read_words(path: Path) -> tuple[list[str], list[str]]:
    """Return the words of the first 94 % of the text, for training, and those of the last 5 %, for all else."""
    words = re.findall("[a-z]+", gzip.decompress(path.read_bytes()).decode("utf-8"))
    return words[: int(0.94 * len(words))], words[int(0.95 * len(words)) :]


def draw(words: list[str], rng: random.Random) -> Rewriting:
    """Return a rewriting by a random task, of two or three consecutive words."""
    start = rng.randrange(len(words) - 3)
    text = " ".join(words[start : start + rng.randint(2, 3)])[:LONGEST].strip()
    task = rng.choice(sorted(TASKS))
    source, target = TASKS[task](text)
    return {"task": task, "source": source, "target": target}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of letters, the space, and a sign for each task."""
    names = ["<pad>", "</s>", "<unk>", " ", *LETTERS, *(f"<{task}>" for task in sorted(TASKS))]
    inner = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|."), "isolated")
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def make_model(vocabulary: int, experts: int) -> SwitchTransformersForConditionalGeneration:
    """Return an untrained model of two encoder and two decoder layers, all of them sparse."""
    config = SwitchTransformersConfig(
        vocab_size=vocabulary,
        d_model=96,
        d_kv=24,
        d_ff=192,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        num_experts=experts,
        # Longer than any example: no token is dropped, whatever the routing.
        expert_capacity=64,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = SwitchTransformersForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "router" in name:
            # The library starts routers at unit variance, which fixes a token's expert before any is trained.
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def split_experts(model: SwitchTransformersForConditionalGeneration) -> SwitchTransformersForConditionalGeneration:
    """Return a copy of the model in which each expert is two, with hidden units in different orders."""
    larger = make_model(model.config.vocab_size, 2 * model.config.num_experts)
    small = dict(model.named_parameters())
    for name, parameter in larger.named_parameters():
        if "router" in name:
            rows = small[name].repeat_interleave(2, dim=0)
            parameter.copy_(rows + 0.5 * rows.std() * torch.randn_like(rows))
        elif ".experts." not in name:
            parameter.copy_(small[name])
    for name, experts in larger.named_modules():
        if name.endswith(".experts"):
            ancestors = model.get_submodule(name)
            for index, expert in enumerate(experts.values()):
                ancestor, order = ancestors[f"expert_{index // 2}"], torch.randperm(expert.wi.out_features)
                expert.wi.weight.copy_(ancestor.wi.weight[order])
                # An expert's probability scales its output, and is now shared with its twin's.
                expert.wo.weight.copy_(2 * ancestor.wo.weight[:, order])
    return larger


def train(
    model: SwitchTransformersForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    words: list[str],
    steps: range,
    arguments: argparse.Namespace,
) -> None:
    """Train on some of the steps with AdamW, a warm-up and a cosine over all, and print the loss as it falls."""
    rng = random.Random(arguments.seed + steps.start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda done: (
            min((done + 1) / 200, 1) * (0.5 + 0.5 * math.cos(math.pi * (steps.start + done) / arguments.steps))
        ),
    )
    losses, start = [], time.monotonic()
    model.train()
    for step in steps:
        drawn = [rewriting(**draw(words, rng)) for _ in range(arguments.batch_size)]
        (batch,) = batches(tokenizer, drawn, len(drawn))
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 200 == 0:
            print(f"step {step} loss {sum(losses) / len(losses):.3f} ({time.monotonic() - start:.0f} s)", flush=True)
            losses = []
    model.eval()


def write_rewritings(path: Path, drawn: list[Rewriting]) -> None:
    """Write rewritings as JSON Lines, with what the model reads as their `text`."""
    rows = [{**item, "text": rewriting(**item).source} for item in drawn]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Train, write the assets in half precision, and print and keep the figures of what was written."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    training, held_out = read_words(arguments.text)
    tokenizer = make_tokenizer()
    split = round(arguments.split_at * arguments.steps)
    model = make_model(len(tokenizer), arguments.experts // 2)
    train(model, tokenizer, training, range(1, split + 1), arguments)
    model = split_experts(model)
    print(f"{model.num_parameters():,} parameters")
    train(model, tokenizer, training, range(split + 1, arguments.steps + 1), arguments)
    rng = random.Random(arguments.seed + 1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, number in (
        ("calibration", arguments.calibration_examples),
        ("evaluation", arguments.evaluation_examples),
    ):
        drawn = [draw(held_out, rng) for _ in range(number)]
        write_rewritings(arguments.output / f"{name}.jsonl", drawn)
    model.half().save_pretrained(arguments.output / "model")
    tokenizer.save_pretrained(arguments.output / "model")
    loaded = SwitchTransformersForConditionalGeneration.from_pretrained(arguments.output / "model", dtype="float32")
    examples = [rewriting(**item) for item in drawn]
    figures = {"all": evaluate(loaded, tokenizer, examples)}
    for task in sorted(TASKS):
        figures[task] = evaluate(loaded, tokenizer, [example for example in examples if example.group == task])
    (arguments.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
