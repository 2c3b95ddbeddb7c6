"""The teacher of a distillation: loading it, and checking that it speaks of the same tokens as the student."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from hf_mcsmoe.layers.labels import labelled
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.modeling.companions_mcsmoe import TOKENIZER, source_of


def load_teacher(
    teacher: PreTrainedModel | str | Path,
    student: PreTrainedModel,
    processing_class: Any,
    dtype: str,
    device_map: str | None,
) -> PreTrainedModel:
    """Return the teacher, a model or what its path or Hub id names, in evaluation mode and without gradients.

    Args:
        processing_class: the student's tokenizer or processor; None for the one beside the student.

    Raises:
        ValueError: no such model, or one of another kind, vocabulary or tokenizer.
    """
    if isinstance(teacher, str | Path):
        teacher = load_model(str(teacher), dtype=dtype, device_map=device_map)
    check_kind(student, teacher)
    check_classes(student, teacher)
    check_vocabulary(vocabulary_size(student), vocabulary_size(teacher))
    check_tokenizer(student, teacher, processing_class)
    return teacher.eval().requires_grad_(False)


def check_kind(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise ValueError where one is an encoder-decoder and the other is not, or their labels are of other kinds."""
    ours, theirs = ((item.config.is_encoder_decoder, labelled(item)) for item in (student, teacher))
    if ours != theirs:
        raise ValueError(
            f"The teacher is a {type(teacher).__name__}, the student a {type(student).__name__}: a teacher must be "
            "the original model of the student, or one of its kind."
        )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return how many tokens a model's logits are over; of a classifier, how many it reads."""
    embeddings: Any = model.get_output_embeddings() or model.get_input_embeddings()
    return len(embeddings.weight)


def check_classes(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise ValueError where two classifiers tell other classes, or the same ones in another order."""
    if labelled(student) in ("texts", "tokens"):
        ours, theirs = student.config.id2label, teacher.config.id2label
        if ours != theirs:
            raise ValueError(
                f"The teacher tells the classes {theirs}, the student {ours}: a teacher must be the original model of "
                "the student, or one with the same id2label in its configuration."
            )


def check_vocabulary(ours: int, theirs: int) -> None:
    """Raise ValueError where student and teacher do not have the same number of tokens."""
    if ours != theirs:
        raise ValueError(
            f"The teacher has {theirs} tokens in its vocabulary, the student {ours}: a teacher must be the original "
            "model of the student, or one with the same tokenizer."
        )


def check_tokenizer(student: PreTrainedModel, teacher: PreTrainedModel, processing_class: Any = None) -> None:
    """Compare the tokenizers, where both sides have one.

    Args:
        processing_class: the student's tokenizer or processor; None for the one beside the student.

    Raises:
        ValueError: a number stands for one token here and for another there.
    """
    if isinstance(processing_class, ProcessorMixin):
        processing_class = vars(processing_class).get("tokenizer")
    given = processing_class if isinstance(processing_class, PreTrainedTokenizerBase) else None
    if given is None and student.name_or_path == teacher.name_or_path:
        return
    theirs = _tokenizer_beside(teacher)
    ours = (given or _tokenizer_beside(student)) if theirs else None
    if ours is None or theirs is None:
        return
    tokens = {number: token for token, number in theirs.get_vocab().items()}
    other = [(number, token) for token, number in ours.get_vocab().items() if tokens.get(number, token) != token]
    if other:
        number, token = min(other)
        raise ValueError(
            f"The teacher {teacher.name_or_path} has another tokenizer: {len(other)} tokens differ; {number} is "
            f"{token!r} for the student and {tokens[number]!r} for the teacher. A teacher must be the original model "
            "of the student, or one with the same tokenizer."
        )


def _tokenizer_beside(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in the folder or repository that a model was loaded from; None where there is none."""
    folder = source_of(model)
    if folder is None or not any(list(Path(folder).glob(pattern)) for pattern in TOKENIZER):
        return None
    try:
        return load_tokenizer(str(folder))
    except ValueError:  # files that nobody can read say nothing
        return None
