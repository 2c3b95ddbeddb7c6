"""What a model's labels are of: its tokens, or its texts as wholes."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

# How the names of classes end, and what their labels are of.
TASKS = {
    "ForTokenClassification": "tokens",
    "ForMaskedLM": "tokens",
    "ForSequenceClassification": "texts",
    "ForQuestionAnswering": "spans",
    "ForMultipleChoice": "choices",
}


def labelled(model: PreTrainedModel) -> str:
    """Return what a model's labels are of: the next "text", its "tokens", whole "texts", "spans"; "" if not known."""
    names = [base.__name__ for base in type(model).__mro__]
    found = (task for ending, task in TASKS.items() if any(name.endswith(ending) for name in names))
    return next(found, "text" if type(model).can_generate() else "")


def labels_are_of_tokens(model: PreTrainedModel, batch: Mapping[str, Any]) -> bool:
    """Tell whether a batch's labels are one of each token, and so tell which of them count.

    Numbers with a fraction never are, whatever their shape; of a class that says nothing, integers of the shape of its
    inputs.
    """
    labels, task = batch["labels"], labelled(model)
    if labels.is_floating_point() or labels.ndim == 1 or task in ("texts", "spans", "choices"):
        return False
    inputs = next((batch[name] for name in ("decoder_input_ids", "input_ids") if batch.get(name) is not None), labels)
    return task in ("text", "tokens") or labels.shape == inputs.shape
