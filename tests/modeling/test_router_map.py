"""The map in the router: whatever a load leaves in its buffer, it holds what the configuration says."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from families import families
from helpers import logits
from merged import REFUSED, example, merge, save, stored_experts
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_mcsmoe import MergeConfig, moe_layers
from hf_mcsmoe.modeling.router_mcsmoe import expert_maps, map_of, unmapped

INTERFACE = [family.name for family in families() if family.name not in REFUSED and family.interface]


def maps(model: PreTrainedModel) -> list[list[int]]:
    """Return what the buffers hold."""
    return [module.expert_map.tolist() for _, module in expert_maps(model)]


def planned(name: str) -> list[list[int]]:
    """Return what the plan says."""
    return [item.expert_map for item in example(name).plan.layers.values()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved merged models: of the experts interface, and with the map in a block."""
    folder = tmp_path_factory.mktemp("maps")
    return {name: save(example(name), folder) for name in ("mixtral", "dbrx", "jetmoe")}


@pytest.mark.parametrize("name", INTERFACE)
def test_experts_of_the_interface_are_the_librarys_and_their_router_returns_stored_experts(name: str) -> None:
    case = example(name)
    for before, after in zip(moe_layers(case.base), moe_layers(case.merged), strict=True):
        assert type(after.container) is type(before.container)
        assert "expert_map" not in after.container._buffers
        assert after.container.num_experts == len(after.read()) == max(after.expert_map) + 1 < before.num_experts
        assert list(after.expert_map) == case.plan.layers[before.name].expert_map
        assert map_of(case.base, before.name) is None
        routers = [unmapped(model, layer.name) for model, layer in ((case.base, before), (case.merged, after))]
        assert isinstance(routers[1], type(routers[0]))
        assert "expert_map" in routers[1]._buffers
        assert routers[1].state_dict().keys() == routers[0].state_dict().keys()


@pytest.mark.parametrize("name", ["mixtral", "dbrx", "jetmoe"])
def test_memory_that_was_not_written_becomes_the_map_again(name: str, folders: dict[str, Path]) -> None:
    case = example(name)
    model = copy.deepcopy(case.merged).to_empty(device="cpu")
    assert maps(model) == planned(name)
    model = copy.deepcopy(case.merged).to("meta")
    assert maps(model.to_empty(device="cpu")) == planned(name)
    assert maps(copy.deepcopy(case.merged).to(torch.bfloat16)) == planned(name)
    fresh = type(case.merged).from_pretrained(folders[name])  # recorded router logits leave hooks that do not pickle
    assert maps(pickle.loads(pickle.dumps(fresh))) == planned(name)


@pytest.mark.parametrize("name", ["mixtral", "dbrx", "jetmoe"])
def test_accelerate_loads_into_a_model_without_memory(name: str, folders: dict[str, Path]) -> None:
    case = example(name)
    with init_empty_weights():
        model = type(case.merged)(copy.deepcopy(case.merged.config))
    model.tie_weights()
    model = load_checkpoint_and_dispatch(model, folders[name], device_map={"": "cpu"}).eval()
    torch.testing.assert_close(logits(model, case.batch), logits(case.merged, case.batch), atol=1e-5, rtol=1e-5)
    assert maps(model) == planned(name)


def test_a_map_that_was_left_without_memory_is_made_when_it_is_needed() -> None:
    case = example("mixtral")
    model = copy.deepcopy(case.merged)
    for _, module in expert_maps(model):
        module.expert_map = module.expert_map.to("meta")
    assert torch.equal(logits(model, case.batch), logits(case.merged, case.batch))


@pytest.mark.parametrize("name", ["mixtral", "dbrx", "jetmoe"])
def test_a_load_that_takes_modules_for_initialised_leaves_the_map(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any quantiser says so of the modules that it touches, whose buffers are then left as the memory was."""
    model_class = type(example(name).merged)
    move = model_class._move_missing_keys_from_meta_to_device

    def spoil(model: Any, *args: Any) -> None:
        move(model, *args)
        for _, module in expert_maps(model):
            module.expert_map.fill_(10**9)
        for module in model.modules():
            module._is_hf_initialized = True

    monkeypatch.setattr(model_class, "_move_missing_keys_from_meta_to_device", spoil)
    assert maps(model_class.from_pretrained(folders[name])) == planned(name)


class Counted(torch.Tensor):
    """A tensor that, as quantized ones do, can be indexed and multiplied, but not taken apart."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.Tensor.unbind, torch.unbind):
            raise NotImplementedError("unbind")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("compiling", [False, True])
def test_our_implementation_runs_on_weights_of_a_class_of_their_own(
    compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = example("mixtral").base
    counts = [8] + [4] * (len(moe_layers(base)) - 1)  # the first layer is kept whole
    _, merged = merge(base, "mixtral", MergeConfig(budget=lambda *_: counts))
    assert stored_experts(merged) == counts
    expected, batch = logits(merged, example("mixtral").batch), example("mixtral").batch
    product = moe._grouped_mm

    def refusing(states: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if isinstance(weight, Counted):
            raise NotImplementedError("grouped product")
        return product(states, weight, *args, **kwargs)

    monkeypatch.setattr(moe, "_grouped_mm", refusing)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    model = merged.requires_grad_(False)
    for layer in moe_layers(model):
        for name, parameter in list(layer.container.named_parameters(recurse=False)):
            setattr(layer.container, name, nn.Parameter(parameter.data.as_subclass(Counted), requires_grad=False))
            assert isinstance(getattr(layer.container, name), Counted)
    torch.testing.assert_close(logits(model, batch).as_subclass(torch.Tensor), expected, atol=1e-6, rtol=1e-6)


def test_our_implementation_is_the_default_and_can_be_left(folders: dict[str, Path]) -> None:
    case = example("mixtral")
    assert case.merged.config._experts_implementation == "mcsmoe"
    assert "mcsmoe" in ALL_EXPERTS_FUNCTIONS
    assert AutoModelForCausalLM.from_pretrained(folders["mixtral"]).config._experts_implementation == "mcsmoe"
    asked = AutoModelForCausalLM.from_pretrained(folders["mixtral"], experts_implementation="eager")
    assert asked.config._experts_implementation == "eager"
    assert "experts_implementation" not in json.loads((folders["mixtral"] / "config.json").read_text())


def test_a_wrapped_text_model_has_it_in_its_part_of_the_configuration(tmp_path: Path) -> None:
    case = example("qwen3_vl_moe")
    case.merged.save_pretrained(tmp_path)
    for model in (case.merged, type(case.merged).from_pretrained(tmp_path)):
        assert moe_layers(model)[0].container.config._experts_implementation == "mcsmoe"
        model = copy.deepcopy(model)
        model.set_experts_implementation("eager")
        assert moe_layers(model)[0].container.config._experts_implementation == "eager"
