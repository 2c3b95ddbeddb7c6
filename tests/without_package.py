"""Checks of saved folders, run by the tests in a process of their own where `hf_mcsmoe` cannot be imported.

Usage: without_package.py FOLDER=CHECK,CHECK,... ...   writes report.json into the working directory.
"""

import copy
import functools
import json
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Saved:
    """A folder with a merged model, and what was written beside it about the model that was saved."""

    folder: Path
    expected: dict[str, Any]
    scratch: Path

    def load(self, folder: Path | None = None, **kwargs: Any) -> PreTrainedModel:
        """Load the folder; no key may be missing, unexpected or mismatched."""
        model, info = self.load_as(self.expected["auto_class"], folder, **kwargs)
        problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
        assert not problems, problems
        return model

    def load_as(self, auto_class: str, folder: Path | None = None, **kwargs: Any) -> tuple[PreTrainedModel, dict]:
        """Load the folder by an Auto class; returns the loading info as well."""
        cls = getattr(transformers, auto_class)
        return cls.from_pretrained(folder or self.folder, trust_remote_code=True, output_loading_info=True, **kwargs)

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> torch.Tensor:
        """Run the model on the inputs that the saved one saw."""
        return model(**self.expected["batch"]).logits

    def assert_same(self, model: PreTrainedModel) -> None:
        """Compare with the logits of the saved model bit for bit."""
        found, expected = self.logits(model), self.expected["logits"]
        assert torch.equal(found, expected), f"logits differ by up to {(found.float() - expected).abs().max()}"

    def loss(self, model: PreTrainedModel) -> torch.Tensor:
        """Return a loss of the inputs for a backward pass."""
        torch.manual_seed(0)
        return model(**self.expected["batch"]).logits.float().logsumexp(-1).mean()


CHECKS: dict[str, Callable[[Saved], None]] = {}


def check(function: Callable[[Saved], None]) -> Callable[[Saved], None]:
    """Make a check known by its name."""
    CHECKS[function.__name__] = function
    return function


def recorded(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, list[torch.Size]]:
    """Return the shapes of what a model records of its layers on demand."""
    output = model(**batch, output_router_logits=True, output_hidden_states=True)
    states = {key: value for key, value in output.items() if key.endswith(("router_logits", "hidden_states"))}
    return {key: [item.shape for item in value] for key, value in states.items() if isinstance(value, tuple)}


@check
def loads(saved: Saved) -> None:
    model = saved.load()
    saved.assert_same(model)
    assert recorded(model, saved.expected["batch"]) == saved.expected["recorded"]
    assert isinstance(model, getattr(transformers, saved.expected["base_class"]))
    assert [name for name, _ in model.named_modules()] == saved.expected["modules"]
    assert "hf_mcsmoe" not in sys.modules


@check
def saves_again(saved: Saved) -> None:
    saved.load().save_pretrained(saved.scratch, max_shard_size="100KB")
    saved.assert_same(saved.load(saved.scratch))


@check
def saves_all_files_again(saved: Saved) -> None:
    again = saved.scratch / "again"
    saved.load().save_pretrained(again)
    assert {file.name for file in again.iterdir()} == {file.name for file in saved.folder.iterdir()}
    for name in (
        "mcsmoe_plan.json",
        "mcsmoe_record.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "modeling_mcsmoe.py",
    ):
        assert (again / name).read_bytes() == (saved.folder / name).read_bytes(), name
    own, card = saved.folder.name, (saved.folder / "README.md").read_text()
    told = card.replace(f'("{own}"', '("again"').replace(f"pretrained={own},", "pretrained=again,")
    assert (again / "README.md").read_text() == told


@check
def keeps_bfloat16(saved: Saved) -> None:
    model = saved.load(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(saved.scratch)
    again = saved.load(saved.scratch, dtype="auto")
    assert torch.equal(saved.logits(again), saved.logits(model))
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {name: parameter.dtype for name, parameter in again.named_parameters()}


@check
def builds_from_its_configuration(saved: Saved) -> None:
    config = transformers.AutoConfig.from_pretrained(saved.folder, trust_remote_code=True)
    build = functools.partial(getattr(transformers, saved.expected["auto_class"]).from_config, trust_remote_code=True)
    model = build(config).eval()
    assert saved.logits(model).isfinite().all()
    assert model.num_parameters() == saved.load().num_parameters()
    with accelerate.init_empty_weights():
        empty = build(config)
    empty.tie_weights()
    saved.assert_same(accelerate.load_checkpoint_and_dispatch(empty, saved.folder, device_map={"": "cpu"}).eval())


@check
def loads_by_device_map(saved: Saved) -> None:
    saved.assert_same(saved.load(device_map="auto"))


@check
def loads_offloaded_to_disk_and_saves(saved: Saved) -> None:
    size = sum(file.stat().st_size for file in saved.folder.glob("*.safetensors"))
    limits = {"device_map": "auto", "max_memory": {"cpu": size // 2}, "offload_folder": saved.scratch / "offload"}
    model = saved.load(**limits)
    assert "disk" in model.hf_device_map.values()
    saved.assert_same(model)
    model.save_pretrained(saved.scratch / "again")
    saved.assert_same(saved.load(saved.scratch / "again"))


GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 3, "do_sample": False},
    "uncached": {"do_sample": False, "use_cache": False},
}


def generate(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Continue the first text in each way."""
    prompt = {key: value[:1] for key, value in batch.items() if not key.startswith("decoder")}
    tokens = {}
    for name, options in GENERATION.items():
        torch.manual_seed(0)
        tokens[name] = model.generate(**prompt, max_new_tokens=5, **options)
    return tokens


@check
def generates(saved: Saved) -> None:
    found = generate(saved.load(), saved.expected["batch"])
    for name, expected in saved.expected["generated"].items():
        assert torch.equal(found[name], expected), name


@check
def copies_deeply(saved: Saved) -> None:
    model = saved.load()
    copied = copy.deepcopy(model)
    saved.assert_same(copied)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in copied.parameters()}


@check
def pickles(saved: Saved) -> None:
    saved.assert_same(pickle.loads(pickle.dumps(saved.load())))


@check
def compiles(saved: Saved) -> None:
    torch._dynamo.reset()
    model = torch.compile(saved.load(), backend="eager", fullgraph=True)
    torch.testing.assert_close(saved.logits(model), saved.expected["logits"], atol=1e-4, rtol=1e-4)


@check
def runs_every_experts_implementation(saved: Saved) -> None:
    for name in ("eager", "batched_mm", "grouped_mm"):
        for model in (saved.load(), saved.load(experts_implementation=name)):
            model.set_experts_implementation(name)
            assert model.config.get_text_config()._experts_implementation == name
            torch.testing.assert_close(saved.logits(model), saved.expected["logits"], atol=1e-4, rtol=1e-4)


@check
def checkpoints_gradients(saved: Saved) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = saved.load().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        saved.loss(model).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    parameters = dict(saved.load().named_parameters())
    experts = {name for name, parameter in parameters.items() if ".down_proj" in name and parameter.requires_grad}
    assert experts <= gradients[0].keys()
    assert experts or any(name.endswith("_packed") for name in parameters)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


@check
def loads_as_the_base_model_and_with_a_new_head(saved: Saved) -> None:
    base, info = saved.load_as("AutoModel")
    assert not info["missing_keys"]
    assert all(key.startswith("lm_head") for key in info["unexpected_keys"]), info
    model, info = saved.load_as("AutoModelForSequenceClassification", num_labels=3)
    assert all(key.startswith(("score.", "classification_head.")) for key in info["missing_keys"]), info
    hidden = [module(**saved.expected["batch"])[0] for module in (base, getattr(model, model.base_model_prefix))]
    assert torch.equal(*hidden)


@check
def works_in_a_pipeline(saved: Saved) -> None:
    pipeline = transformers.pipeline("text-generation", model=str(saved.folder), trust_remote_code=True)
    text = pipeline("w50 w51 w52", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith("w50 w51 w52w"), text


def attempt(function: Callable[[Saved], None], saved: functools.partial[Saved]) -> str:
    """Return what went wrong, or nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            function(saved(Path(scratch)))
        except Exception:
            return traceback.format_exc()
    return ""


def main(*arguments: str) -> None:
    """Run the checks that are named for each folder."""
    torch.set_num_threads(1)
    report = {}
    for argument in arguments:
        folder, _, names = argument.rpartition("=")
        saved = functools.partial(Saved, Path(folder), torch.load(f"{folder}.pt"))
        report[Path(folder).name] = {name: attempt(CHECKS[name], saved) for name in names.split(",")}
    Path("report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
