"""What a plain checkpoint is to other tools: what the original of its family is to them, with nothing said to them."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, inputs
from helpers import logits, relative_error
from merged import merge, tokenizer
from pruned import pruned
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from hf_mcsmoe import MergeConfig
from hf_mcsmoe.export import export

pytestmark = [
    pytest.mark.slow,
    # PEFT asks for it by the name that Transformers has given up.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # What PEFT prepares for stacked experts and finds no use for, in originals too.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
NAMES = ["qwen3_moe", "olmoe"]


@pytest.fixture(scope="module", params=NAMES)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of an original, of it merged and exported, and of it pruned."""
    at, base = tmp_path_factory.mktemp(request.param), build(request.param)
    base.save_pretrained(at / "original")
    export(merge(base, request.param, MergeConfig(experts=0.5, budget="uniform"))[1], at / "merged")
    pruned(request.param, "uniform").merged.save_pretrained(at / "pruned")
    for kind in ("original", "merged", "pruned"):
        tokenizer().save_pretrained(at / kind)
    return {kind: at / kind for kind in ("original", "merged", "pruned")}


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """Load a folder without any code beside it."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)


def quantized(model: PreTrainedModel) -> set[str]:
    """Return the parameters that are stored in another class."""
    kinds = {name: (type(value), type(value.data)) for name, value in model.named_parameters()}
    return {name for name, kind in kinds.items() if kind != (torch.nn.Parameter, torch.Tensor)}


@pytest.mark.parametrize("kind", ["merged", "pruned"])
def test_adapters_go_over_all_linear_layers(kind: str, folders: dict[str, Path]) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted(folder: Path) -> Any:
        return get_peft_model(load(folder), LoraConfig(target_modules="all-linear"))

    def trained(model: Any) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    model = adapted(folders[kind])
    assert trained(model) == trained(adapted(folders["original"])) != set()
    ids = inputs(kind, model.base_model.model)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.merge_and_unload().save_pretrained(folders[kind] / "adapted")
    assert type(load(folders[kind] / "adapted")) is type(load(folders["original"]))


@pytest.mark.parametrize("kind", ["merged", "pruned"])
def test_torchao_quantizes_the_same_layers(kind: str, folders: dict[str, Path]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    model = load(folders[kind], quantization_config=config)
    assert quantized(model) == quantized(load(folders["original"], quantization_config=config)) != set()
    plain = load(folders[kind])
    batch = inputs(kind, plain)
    assert 0 < relative_error(logits(model, batch), logits(plain, batch)) < 0.2


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["merged", "pruned"])
def test_bitsandbytes_quantizes_the_same_layers(kind: str, folders: dict[str, Path]) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = load(folders[kind], quantization_config=config)
    assert quantized(model) == quantized(load(folders["original"], quantization_config=config)) != set()
    plain = load(folders[kind])
    batch = inputs(kind, plain)
    assert 0 < relative_error(logits(model, batch), logits(plain, batch)) < 0.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["merged", "pruned"])
def test_lm_eval_needs_no_word_of_what_it_is(kind: str, folders: dict[str, Path]) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(folders[kind]), device="cpu", batch_size=1, dtype="float32")
    context, continuation = "w50 w51 w52", " w53 w54"
    request = Instance(request_type="loglikelihood", doc={}, arguments=(context, continuation), idx=0)
    ((found, _),) = harness.loglikelihood([request], disable_tqdm=True)
    ids = tokenizer()(context + continuation, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        chances = load(folders[kind])(input_ids=ids).logits[0, :-1].log_softmax(-1)
    assert found == pytest.approx(chances.gather(1, ids[0, 1:, None])[-2:].sum().item(), rel=1e-4)
