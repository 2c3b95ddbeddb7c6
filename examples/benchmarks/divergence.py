"""Loss of a model, and divergence of its predictions from another's, over the tokens of batches that count."""

import torch
from transformers import PreTrainedModel

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
