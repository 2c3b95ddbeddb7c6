"""Metrics against figures worked out by hand, and evaluation of models that are known to answer right or wrong."""

import math
from typing import Any

import pytest
import torch
from families import build
from merged import tokenizer as word_tokenizer
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_mcsmoe.data.tasks import TASKS, Example, Task
from hf_mcsmoe.evaluation.metrics import Answer, answer_f1, binary_f1, matthews, normalised_answer
from hf_mcsmoe.evaluation.quality import answer_scores, evaluate_task, multiple_choice, perplexity, predict, score


def examples(task: str, labels: list[int], groups: list[str] | None = None) -> list[Example]:
    names = TASKS[task].labels
    groups = groups or [str(number) for number in range(len(labels))]
    return [Example("", (names[label],), label, group) for label, group in zip(labels, groups, strict=True)]


def said(*texts: str) -> list[Answer]:
    return [Answer(text) for text in texts]


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in figures.items()}


def test_accuracy_counts_exact_words_and_says_how_many_were_no_label() -> None:
    answers = said("positive", "negative", " positive ", "Positive", "")
    figures = score(TASKS["sst2"], answers, examples("sst2", [1, 1, 1, 1, 0]))
    assert figures == {"accuracy": 40.0, "no_label": 40.0, "examples": 5}


def test_f1_of_mrpc() -> None:
    # Of 4 equivalent pairs 2 are found, 1 other is named: precision 2/3, recall 2/4, F1 = 4/7.
    answers = said("equivalent", "equivalent", "not_equivalent", "?", "equivalent", "not_equivalent")
    figures = score(TASKS["mrpc"], answers, examples("mrpc", [1, 1, 1, 1, 0, 0]))
    assert rounded(figures) == {"accuracy": 50.0, "f1": 57.14, "no_label": 16.67, "examples": 6}
    assert binary_f1([0, 0], [0, 0]) == 0.0


def test_matthews_of_two_classes_is_the_textbook_formula() -> None:
    # tp 3, tn 2, fp 1, fn 2: (6 - 2) / sqrt(4 * 5 * 3 * 4)
    predicted, gold = [1, 1, 1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0, 1, 1]
    assert matthews(predicted, gold) == pytest.approx(4 / math.sqrt(240))
    assert matthews([1, 1, 1], [1, 0, 1]) == 0.0
    assert matthews([0, 1, 0], [1, 0, 1]) == pytest.approx(-1)
    # Only the margins matter beside the hits: 1 hit of 3, classes said (1, 0, -1), true (1, 1, 0).
    assert matthews([1, 0, -1], [1, 1, 0]) == pytest.approx((3 - 3) / math.sqrt(6 * 4))


def test_correlations_of_stsb() -> None:
    gold = [Example("", (f"{value}",), value) for value in (0.0, 1.0, 2.0, 5.0)]
    figures = score(TASKS["stsb"], said("1.0", "2.0", "4.0", "3.0"), gold)
    # Centred: (-2, -1, 0, 3) and (-1.5, -.5, 1.5, .5); 5 / sqrt(14 * 5). Ranks 1 2 3 4 and 1 2 4 3.
    assert rounded(figures) == {"pearson": 59.76, "spearman": 80.0, "examples": 4}
    assert rounded(score(TASKS["stsb"], said("2") * 4, gold))["pearson"] == 0.0
    # What is no number counts as -1: (-1, 1, 2, 5) against (0, 1, 2, 5), centred 16 / sqrt(18.75 * 14).
    figures = score(TASKS["stsb"], said("none", "1", "2", "5"), gold)
    assert rounded(figures) == {"pearson": 98.75, "spearman": 100.0, "examples": 4}


def test_multirc_counts_answers_and_whole_questions() -> None:
    gold = examples("multirc", [1, 0, 1, 0, 1], ["a", "a", "b", "b", "b"])
    figures = score(TASKS["multirc"], said("True", "False", "True", "True", "False"), gold)
    # Found 2 of 3, named 3: F1 2/3. Question a is right as a whole, b is not.
    expected = {"f1a": 66.67, "exact_match": 50.0, "accuracy": 60.0, "no_label": 0.0, "examples": 5}
    assert rounded(figures) == expected


def test_wikiqa_ranks_the_candidates_of_a_question_where_likelihoods_are_known() -> None:
    gold = examples("wikiqa", [0, 1, 1, 0, 1, 0], ["a", "a", "a", "b", "c", "c"])
    # Margins of "True": question a .1 -2. .3, so its right ones have ranks 3 and 1; b has none; c is right at 2.
    likelihoods = [(-1.0, -0.9), (-1.0, -3.0), (-1.0, -0.7), (0.0, 9.0), (-2.0, -1.0), (-9.0, -7.0)]
    answers = [Answer("False", pair) for pair in likelihoods]
    figures = score(TASKS["wikiqa"], answers, gold)
    # Average precision (1/1 + 2/3) / 2 and 1/2; reciprocal ranks 1 and 1/2.
    expected = {"accuracy": 50.0, "f1": 0.0, "map": 66.67, "mrr": 75.0, "no_label": 0.0, "examples": 6}
    assert rounded(figures) == expected
    assert score(TASKS["wikiqa"], said(*["False"] * 6), gold).keys() == expected.keys() - {"map", "mrr"}


@pytest.mark.parametrize(
    ("text", "plain"),
    [("The  Cat.", "cat"), ("an apple, a day", "apple day"), ("Theatre", "theatre"), ("U.S.A", "usa"), ("a", "")],
)
def test_answers_are_normalised_as_by_squad(text: str, plain: str) -> None:
    assert normalised_answer(text) == plain


def test_squad_takes_the_nearest_of_all_gold_answers() -> None:
    gold = [
        Example("", ("in October 1973", "October")),
        Example("", ("the red house",)),
        Example("", ("five",)),
    ]
    figures = score(TASKS["squad"], said("October.", "red big house red", "six"), gold)
    # "red big house red" and "red house" share 2 words of 4 and 2: F1 2/3. Mean (1 + 2/3 + 0) / 3.
    assert rounded(figures) == {"exact_match": 33.33, "f1": 55.56, "examples": 3}
    assert answer_f1("", "x") == 0.0


def test_hotpotqa_gives_no_credit_for_words_beside_yes_or_no() -> None:
    gold = [Example("", ("yes",)), Example("", ("no",)), Example("", ("Ed Wood",))]
    figures = score(TASKS["hotpotqa"], said("yes indeed", "No.", "Wood"), gold)
    assert rounded(figures) == {"exact_match": 33.33, "f1": 55.56, "examples": 3}


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        score(TASKS["sst2"], [], [])


def tokenizer() -> PreTrainedTokenizerFast:
    made = word_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A w2", special_tokens=[("w2", 2)])
    return made


def _format(row: Any) -> Example:
    return Example(row["text"], (f"w{50 + row['label']}",), row["label"])


# The answer is one of two words; sources differ in length, so that batches are padded.
TOY = Task("toy", "none/toy", None, _format, ("accuracy",), ("w50", "w51"), max_target_length=4)
ROWS = [{"text": " ".join(f"w{60 + n + k}" for k in range(2 + n % 3)), "label": n % 2} for n in range(7)]


@pytest.fixture(scope="module")
def switch() -> PreTrainedModel:
    """Train a tiny model to answer the toy task right."""
    torch.manual_seed(0)
    model, words = build("switch_transformers"), tokenizer()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sources = words([row["text"] for row in ROWS], padding=True, return_tensors="pt")
    labels = words([f"w{50 + row['label']}" for row in ROWS], return_tensors="pt")["input_ids"]
    for _ in range(150):
        loss = model(input_ids=sources.input_ids, attention_mask=sources.attention_mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    return model.eval()


@pytest.mark.parametrize("by", ["generation", "likelihood"])
@pytest.mark.slow
def test_a_model_that_knows_the_answers_is_told_so_and_one_that_is_asked_the_reverse_is_not(
    switch: PreTrainedModel, by: str
) -> None:
    switch.train()
    wrong = [row | {"label": 1 - row["label"]} for row in ROWS]
    for rows, accuracy in ((ROWS, 100.0), (wrong, 0.0), (ROWS[:3] + wrong[3:4], 75.0)):
        figures = evaluate_task(switch, tokenizer(), TOY, rows, batch_size=3, by=by)
        assert figures == {"accuracy": accuracy, "no_label": 0.0, "examples": len(rows)}
    assert switch.training, "or the model was not left as it was"
    switch.eval()


def test_answers_do_not_depend_on_the_batch_and_keep_the_order(switch: PreTrainedModel) -> None:
    made = TOY.examples(ROWS)
    answers = [predict(switch, tokenizer(), TOY, made, batch_size=size) for size in (1, 7)]
    assert answers[0] == answers[1] == [Answer(item.targets[0]) for item in made]


def test_answers_are_as_long_as_allowed(switch: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed, generate = [], switch.generate
    monkeypatch.setattr(
        switch, "generate", lambda **given: (allowed.append(given["max_new_tokens"]), generate(**given))[1]
    )
    for length in (None, 2):
        evaluate_task(switch, tokenizer(), TOY, ROWS, max_target_length=length)
    assert allowed == [TOY.max_target_length, 2]


def test_by_likelihood_each_answer_comes_with_those_of_all_labels(switch: PreTrainedModel) -> None:
    made = TOY.examples(ROWS)
    answers = predict(switch, tokenizer(), TOY, made, batch_size=3, by="likelihood")
    for label, position in zip(TOY.labels, (0, 1), strict=True):
        found = answer_scores(switch, tokenizer(), [(item.source, label) for item in made], batch_size=len(made))
        assert [answer.likelihoods[position] for answer in answers] == pytest.approx(found, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["switch_transformers", "mixtral"])
def test_likelihood_is_the_models_own_text_by_text(family: str) -> None:
    model, words = build(family).eval(), tokenizer()
    if family == "mixtral":
        words = word_tokenizer()
    pairs = [("w60 w61 w62", "w50"), ("w63", "w51 w52"), ("w64 w65", "w53 w54 w55")]
    found = answer_scores(model, words, [(context, f" {answer}") for context, answer in pairs], batch_size=2)
    for (context, answer), value in zip(pairs, found, strict=True):
        source, target = words(context)["input_ids"], words(answer)["input_ids"]
        if family == "mixtral":
            row = model(input_ids=torch.tensor([source + target])).logits.log_softmax(-1)[0]
            expected = sum(row[len(source) - 1 + k, token] for k, token in enumerate(target))
        else:
            start = torch.tensor([[model.config.decoder_start_token_id, *target[:-1]]])
            row = model(input_ids=torch.tensor([source]), decoder_input_ids=start).logits.log_softmax(-1)[0]
            expected = sum(row[k, token] for k, token in enumerate(target))
        assert value == pytest.approx(float(expected), abs=1e-4)


@torch.no_grad()
def test_perplexity_counts_each_token_once_and_no_padding() -> None:
    model = build("mixtral").eval()
    torch.manual_seed(1)
    ids = torch.randint(48, 128, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    losses = []
    for row, length in zip(ids, mask.sum(1).tolist(), strict=True):
        scores = model(input_ids=row[None, :length]).logits.log_softmax(-1)[0]
        losses += [-float(scores[k, row[k + 1]]) for k in range(length - 1)]
    expected = math.exp(sum(losses) / len(losses))
    whole = {"input_ids": ids, "attention_mask": mask}
    parts = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 1), slice(1, 3))]
    assert perplexity(model, [whole]) == pytest.approx(expected, rel=1e-4)
    assert perplexity(model, parts) == pytest.approx(expected, rel=1e-4)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    kept = [
        loss for row, start in ((0, 0), (1, 8), (2, 12)) for loss in losses[start : start + (4 if row == 1 else 8)][3:]
    ]
    assert perplexity(model, [{**whole, "labels": labels}]) == pytest.approx(math.exp(sum(kept) / len(kept)), rel=1e-4)


@torch.no_grad()
def test_perplexity_of_an_encoder_decoder_is_that_of_its_labels(switch: PreTrainedModel) -> None:
    words = tokenizer()
    source = words(["w60 w61", "w62"], padding=True, return_tensors="pt")
    labels = words(["w50 w51", "w52"], padding=True, return_tensors="pt")
    labels = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    batch = {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"], "labels": labels}
    scores = switch(**batch).logits.log_softmax(-1)
    losses = [-float(scores[r, c, labels[r, c]]) for r, c in (labels != -100).nonzero().tolist()]
    assert perplexity(switch, [batch]) == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)


def test_perplexity_of_nothing_or_of_nan_is_an_error() -> None:
    model = build("mixtral")
    batch = {"input_ids": torch.full((1, 4), 50)}
    for nothing in ([], [{**batch, "attention_mask": torch.zeros(1, 4, dtype=torch.long)}]):
        with pytest.raises(ValueError, match="No token to predict"):
            perplexity(model, nothing)
    model.lm_head.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        perplexity(model, [batch])


@torch.no_grad()
def test_multiple_choice_with_and_without_regard_to_length() -> None:
    model, words = build("mixtral").eval(), word_tokenizer()
    context, choices = "w60 w61", [" w50", " w51 w52 w53", " w54 w55"]
    values = answer_scores(model, words, [(context, choice) for choice in choices])
    plain = max(range(3), key=lambda k: values[k])
    relative = max(range(3), key=lambda k: values[k] / len(choices[k].strip()))
    assert plain != relative, "or the two figures would not differ"
    rows = [
        (context, choices, plain),
        (context, choices, plain),
        (context, choices, relative),
        (context, choices, plain),
    ]
    figures = multiple_choice(model, words, rows, batch_size=5)
    assert figures == {"accuracy": 75.0, "accuracy_normalised": 25.0, "examples": 4}


def test_wrong_requests_are_told(switch: PreTrainedModel) -> None:
    words, causal = tokenizer(), build("mixtral")
    with pytest.raises(ValueError, match=r"Unknown way of evaluating 'likelyhood'\. Did you mean 'likelihood'"):
        evaluate_task(switch, words, TOY, ROWS, by="likelyhood")
    with pytest.raises(ValueError, match="no labels to choose from"):
        predict(switch, words, TASKS["squad"], [Example("w50", ("w51",))], by="likelihood")
    with pytest.raises(ValueError, match='Evaluate it with by="likelihood"'):
        evaluate_task(causal, words, TOY, ROWS)
    with pytest.raises(ValueError, match="turns the label 'negative' of task 'sst2' into"):
        predict(switch, words, TASKS["sst2"], [Example("w50", ("positive",), 1)])
    with pytest.raises(ValueError, match="no number 2"):
        multiple_choice(causal, words, [("w60", [" w50", " w51"], 2)])
    with pytest.raises(ValueError, match="adds no token"):
        multiple_choice(causal, words, [("w60", ["", " w51"], 1)])
    with pytest.raises(ValueError, match="no rows"):
        multiple_choice(causal, words, [])
