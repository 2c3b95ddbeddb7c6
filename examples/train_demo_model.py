"""Train the small Switch Transformer of the demo and write it, with its task, to `hf_mcsmoe/demo_assets`.

    python examples/train_demo_model.py --data ../shared/data

The model fills masked spans in five kinds of text: children's stories, plays, an encyclopedia, descriptions of
everyday scenes and Python code. One CPU core is enough.
"""

import argparse
import gzip
import json
import math
import platform
import random
import re
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from hf_mcsmoe.denoising import denoising_batches, denoising_metrics, sentinel_token_ids


SENTINELS = [f"<extra_id_{index}>" for index in range(32)]
PASSAGE_LENGTH = (100, 260)
HELD_OUT = 12

Documents = tuple[list[str], list[str]]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="directory of the raw text")
    parser.add_argument("--output", type=Path, default=Path("hf_mcsmoe/demo_assets"), help="directory to write")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--max-length", type=int, default=96, help="tokens of a text")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2, help="layers of the encoder, and as many of the decoder")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--expert-width", type=int, default=256)
    parser.add_argument("--experts", type=int, default=8, help="experts of every layer")
    parser.add_argument("--z-loss", type=float, default=1e-3)
    parser.add_argument("--balance-loss", type=float, default=5e-3)
    parser.add_argument("--router-scale", type=float, default=0.1)
    parser.add_argument("--calibration-texts", type=int, default=32, help="calibration texts of every domain")
    parser.add_argument("--evaluation-texts", type=int, default=40, help="evaluation texts of every domain")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_text(path: Path) -> str:
    """Read a gzipped text."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def read_records(path: Path) -> list[dict]:
    """Read a gzipped file of one JSON object a line."""
    return [json.loads(line) for line in read_text(path).splitlines()]


def hold_out(documents: list[str]) -> Documents:
    """Part `documents` into those to train on and every twelfth, which is kept from training."""
    training = [document for index, document in enumerate(documents) if index % HELD_OUT]
    return training, documents[::HELD_OUT]


def read_stories(data: Path) -> Documents:
    """Read TinyStories; a story starts with the line behind a paragraph that no empty line follows."""
    text = read_text(data / "text" / "tinystories_4m_lowercased.txt.gz")
    # A story's paragraphs are parted by an empty line and stories by a plain line break.
    return hold_out(re.split(r"(?<!\n)\n(?!\n)", text))


def read_plays(data: Path) -> Documents:
    """Read Shakespeare in sections of forty speeches."""
    speeches = read_text(data / "text" / "tinyshakespeare.txt.gz").split("\n\n")
    return hold_out(["\n\n".join(speeches[start : start + 40]) for start in range(0, len(speeches), 40)])


def read_encyclopedia(data: Path) -> Documents:
    """Read the Wikipedia paragraphs of SQuAD, an article a document."""
    articles: dict[str, dict[str, None]] = {}
    for record in read_records(data / "hub" / "rajpurkar" / "squad" / "plain_text.validation.jsonl.gz"):
        articles.setdefault(record["title"], {})[record["context"]] = None
    return hold_out(["\n".join(paragraphs) for paragraphs in articles.values()])


def read_scenes(data: Path) -> Documents:
    """Read the scene descriptions of HellaSwag with their right endings, its own validation split being held out."""
    parts = []
    for split in ("train", "validation"):
        records = read_records(data / "hub" / "Rowan" / "hellaswag" / f"default.{split}.jsonl.gz")
        # The rest of the data set is cut from WikiHow, whose own licence is not as free.
        scenes = [record for record in records if "How to" not in record["ctx"]]
        parts.append([f"{record['ctx']} {record['endings'][int(record['label'])]}" for record in scenes])
    return parts[0], parts[1]


def read_code(_: Path) -> Documents:
    """Read the standard library of the running Python, without the files that name a copyright of their own."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    sources = [file.read_text(encoding="utf-8") for file in files]
    return hold_out([source for source in sources if "copyright" not in source.lower()])


READERS: dict[str, Callable[[Path], Documents]] = {
    "stories": read_stories,
    "plays": read_plays,
    "encyclopedia": read_encyclopedia,
    "scenes": read_scenes,
    "code": read_code,
}


def passages(document: str) -> Iterator[str]:
    """Cut a document between lines and sentences to passages of about three hundred characters."""
    shortest, longest = PASSAGE_LENGTH
    passage = ""
    for piece in [*re.split(r"(?<=\n)|(?<=[.!?] )", document), None]:
        if piece is None or len(passage) + len(piece) > longest:
            if len(passage.strip()) >= shortest:
                yield passage.strip("\n")
            passage = ""
        passage += piece or ""


def read_domains(data: Path) -> dict[str, Documents]:
    """Return the passages of every domain: those to train on and the held-out ones."""
    domains = {}
    for name, read in READERS.items():
        training, held_out = (
            list(dict.fromkeys(passage for document in documents for passage in passages(document)))
            for documents in read(data)
        )
        seen = set(training)
        domains[name] = (training, [passage for passage in held_out if passage not in seen])
        print(f"{name}: {len(training)} passages to train on, {len(domains[name][1])} held out", flush=True)
    return domains


def train_tokenizer(domains: dict[str, Documents], size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the same amount of text from every domain."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "</s>", "<unk>", *SENTINELS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((text for training, _ in domains.values() for text in training[:3000]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=SENTINELS,
        model_max_length=max_length,
    )


def make_model(arguments: argparse.Namespace) -> SwitchTransformersForConditionalGeneration:
    """Build an untrained Switch Transformer of which every layer is sparse."""
    config = SwitchTransformersConfig(
        vocab_size=arguments.vocabulary,
        d_model=arguments.width,
        d_kv=arguments.width // 4,
        num_heads=4,
        d_ff=arguments.expert_width,
        num_layers=arguments.layers,
        num_decoder_layers=arguments.layers,
        num_sparse_encoder_layers=arguments.layers,
        num_sparse_decoder_layers=arguments.layers,
        num_experts=arguments.experts,
        # Longer than any text: no token is dropped, whatever the routing, also after experts are merged.
        expert_capacity=128,
        router_z_loss_coef=arguments.z_loss,
        router_aux_loss_coef=arguments.balance_loss,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = SwitchTransformersForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "router" in name:
            # The library starts routers at unit variance, which fixes every token's expert before any is trained.
            torch.nn.init.normal_(parameter, std=arguments.router_scale)
    return model


def router_loss(logits: Tensor, mask: Tensor, config: SwitchTransformersConfig) -> Tensor:
    """Return a layer's weighted z and balance losses from router logits (batch, length, experts) and a token mask."""
    logits = logits[mask.bool()]
    shares = torch.nn.functional.one_hot(logits.argmax(-1), config.num_experts).float().mean(0)
    balance = config.num_experts * (shares * logits.softmax(-1).mean(0)).sum()
    return config.router_z_loss_coef * logits.logsumexp(-1).pow(2).mean() + config.router_aux_loss_coef * balance


def training_loss(model: SwitchTransformersForConditionalGeneration, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
    """Return the loss to minimise and its part that comes from the labels."""
    output = model(**batch, output_router_logits=True)
    # The library adds no router loss where every layer is sparse, and else would count padding and mix the layers.
    layers = [(logits, batch["attention_mask"]) for logits in output.encoder_router_logits]
    layers += [(logits, batch["decoder_attention_mask"]) for logits in output.decoder_router_logits]
    loss = output.loss + sum(router_loss(logits, mask, model.config) for logits, mask in layers)
    return loss, output.loss.item()


def train(
    model: SwitchTransformersForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    domains: dict[str, Documents],
    arguments: argparse.Namespace,
) -> list[tuple[int, float]]:
    """Train on batches that draw from all domains alike and return (step, mean label loss) as it falls."""
    rng = random.Random(arguments.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = arguments.steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.525 + 0.475 * math.cos(math.pi * step / arguments.steps)),
    )
    pools = [training for training, _ in domains.values()]
    curve, losses, start = [], [], time.monotonic()
    model.train()
    for step in range(1, arguments.steps + 1):
        texts = [rng.choice(rng.choice(pools)) for _ in range(arguments.batch_size)]
        (batch,) = denoising_batches(
            texts, tokenizer, batch_size=len(texts), max_length=arguments.max_length, seed=step
        )
        loss, label_loss = training_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(label_loss)
        if step % 250 == 0 or step == arguments.steps:
            curve.append((step, sum(losses) / len(losses)))
            losses = []
            print(f"step {step} loss {curve[-1][1]:.3f} ({time.monotonic() - start:.0f} s)", flush=True)
    model.eval()
    return curve
