"""The rows that tell what an error costs: those that no fit sees."""

import pytest
import torch
from families import build
from helpers import batches

from hf_mcsmoe.calibration.inputs import capture_inputs
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.search.probe import Probe, held_out_rows


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("number", [2, 6])
def test_the_rows_of_the_probe_are_those_that_judge_a_fit(family: str, number: int) -> None:
    model = build(family)
    data = batches(family, model, number=number)
    layer = Layers.of(model)[0]
    whole = capture_inputs([layer], data)[layer.name]
    probe = Probe(model, data)
    alone = capture_inputs([layer], probe.batches)[layer.name]
    assert probe.is_held_out
    token = probe.tokens(whole.held_out)
    assert 0 < len(alone.hidden) == len(token) < len(whole.hidden)
    torch.testing.assert_close(alone.hidden, whole.hidden[token], rtol=1e-4, atol=1e-5)


def test_a_row_of_which_no_token_counts_shifts_nothing() -> None:
    model = build("mixtral")
    ids = torch.randint(0, model.config.vocab_size, (10, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[2] = -100
    layer, data = Layers.of(model)[0], [{"input_ids": ids, "labels": labels}]
    whole, probe = capture_inputs([layer], data)[layer.name], Probe(model, data)
    alone = capture_inputs([layer], probe.batches)[layer.name]
    torch.testing.assert_close(alone.hidden, whole.hidden[probe.tokens(whole.held_out)], rtol=1e-4, atol=1e-5)


def test_batches_that_cannot_be_parted_are_probed_from_the_first_row_on() -> None:
    ids = torch.arange(12).view(2, 6)
    assert held_out_rows([{"input_ids": ids[:1]}]) == []  # a single text judges with its end
    assert held_out_rows([{"input_ids": ids, "position_ids": torch.zeros(3, 2, 6)}]) == []
    assert held_out_rows([{"input_ids": ids, "use_cache": False}]) == []
    (found,) = held_out_rows([{"input_ids": ids, "labels": -ids}])
    assert torch.equal(found["input_ids"], ids[1:])
    assert torch.equal(found["labels"], -ids[1:])
