"""Tiny random models of every Mixture-of-Experts family of the installed Transformers.

As a script it prints the page of the families: `python tests/families.py > docs/families.md`.
"""

import copy
import functools
import importlib
import inspect
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, models
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from hf_mcsmoe import MoELayer, moe_layers
from hf_mcsmoe.modeling.configuration_mcsmoe import config_class_for

# These keep their experts outside `use_experts_implementation`; the sources of the library tell all other families.
OUTSIDE = frozenset(
    ["dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"]
)
TASKS = ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM", "TOKEN_CLASSIFICATION")
# The full Qwen3-Omni model has no forward, so its two language models stand for it.
CLASSES = {
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen3_omni_moe_talker": "Qwen3OmniMoeTalkerForConditionalGeneration",
}
NUM_LAYERS, NUM_EXPERTS, VOCAB_SIZE, FIRST_TEXT_TOKEN = 4, 8, 128, 48
# Where models and batches are: `pytest --device cuda`.
DEVICE = os.environ.get("HF_MCSMOE_TEST_DEVICE", "cpu")
EXPERT_FIELDS = frozenset(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"])
TOP_K_FIELDS = frozenset(
    ["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"]
)


def _by_name(sizes: dict[int, str]) -> dict[str, int]:
    return {name: size for size, names in sizes.items() for name in names.split()}


# Upper bounds: a family's single expert group, or the absence of something, is kept.
SIZES = _by_name(
    {
        1: "first_k_dense_replace num_dense_layers topk_group",
        2: "decoder_sparse_step depth encoder_sparse_step index_n_heads linear_num_key_heads n_group n_groups "
        "num_expert_group num_sparse_decoder_layers num_sparse_encoder_layers swa_num_key_value_heads",
        NUM_LAYERS: "decoder_attention_heads decoder_layers encoder_attention_heads encoder_layers linear_num_heads "
        "linear_num_value_heads n_heads n_layers num_attention_heads num_decoder_layers num_heads num_hidden_layers "
        "num_layers num_sliding_attention_heads rotary_dim swa_num_attention_heads zero_expert_num",
        8: "attention_chunk_size chunk_size d_kv d_rel head_dim index_topk kv_channels linear_head_dim "
        "linear_key_head_dim linear_value_head_dim mamba_chunk_size mamba_d_head mamba_head_dim mamba_n_heads "
        "mamba_num_heads qk_nope_head_dim qk_rope_head_dim sliding_window sliding_window_size swa_head_dim v_head_dim",
        16: "index_head_dim kv_lora_rank mamba_d_state q_lora_rank qk_head_dim ssm_state_size",
        24: "d_ff decoder_ffn_dim encoder_ffn_dim expert_ffn_hidden_size ffn_hidden_size intermediate_size "
        "moe_intermediate_size",
        32: "adapter_input_size d_model hidden_size output_channels",
        40: "dense_intermediate_size moe_hidden_size moe_shared_expert_intermediate_size projection_intermediate_size "
        "share_expert_dim shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size",
        128: "max_img_size max_position_embeddings max_seq_len position_embedding_size",
    }
)
# What stands in where a family's default leaves its Mixture-of-Experts layers unset or turned off.
UNSET = {"moe_intermediate_size": 24, "n_shared_experts": 1, "enable_moe_block": True, "is_moe": True}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "mrope_section": [1, 1, 2]}
# What the rules above cannot know, by configuration class.
OVERRIDES: dict[str, dict[str, Any]] = {
    "DbrxAttentionConfig": {"clip_qkv": 8.0, "rope_theta": 1e4},
    "DeepseekOcr2SamVisionConfig": {"downsample_channels": [32, 32]},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "DeepseekV4Config": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "DiffusionGemmaConfig": {"canvas_length": 12},
    "DiffusionGemmaTextConfig": {"global_head_dim": 16},
    "DogeConfig": {"num_experts": 16},
    "Dots3NoteTextConfig": {
        **{"head_dim": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
    },
    "Dots3NoteVisionConfig": {"pyramid_num_routed": [-1, 4, 8, 8]},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [24, 20], "rope_parameters": MROPE},
    "Gemma4TextConfig": {"global_head_dim": 16},
    "Glm4vMoeTextConfig": {"rope_parameters": MROPE},
    "Glm5NextTextConfig": {"index_kpool": 4},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "HYV4VLTextConfig": {"rope_parameters": MROPE},
    "HunYuanMoEV1Config": {"head_dim": 8},
    "InklingVisionConfig": {"patch_size": 2},
    "JambaConfig": {"attn_layer_offset": 2, "attn_layer_period": 4},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "MuseSparkAudioConfig": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 32]},
    "NemotronHConfig": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 40},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 40},
    "Qwen4ExpTextConfig": {
        **{"indexer_budget": 8, "indexer_compress_ratio": 2},
        **{"indexer_head_dim": 16, "indexer_kv_heads": 1, "indexer_n_heads": 2},
    },
    "Step3p7TextConfig": {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8},
    "SwitchTransformersConfig": {"decoder_start_token_id": 0, "expert_capacity": 3},
    "UnlimitedOcrSamVisionConfig": {"downsample_channels": [32, 32]},
}


@dataclass(frozen=True)
class Family:
    """A model class with routed experts; `interface` says that they go through `use_experts_implementation`."""

    name: str
    model_class: str
    folder: str
    interface: bool


@functools.cache
def families() -> list[Family]:
    """List every family by name, from the sources and the name tables of the library alone."""
    folders, classes = _folders(), {}
    for model_type in CONFIG_MAPPING_NAMES:
        folder, model_class = model_type_to_module_name(model_type), _model_class(model_type)
        if folder in folders and model_class is not None:
            named = folder in CONFIG_MAPPING_NAMES or model_type.endswith("_text")
            classes[model_type if named else folder] = model_class
    # One class under two names is one family; of the names in falling order the shorter one is written last.
    names = {model_class: name for name, model_class in sorted((classes | CLASSES).items(), reverse=True)}
    return sorted((_family(*item, folders) for item in names.items()), key=lambda family: family.name)


def _family(model_class: str, name: str, folders: dict[str, bool]) -> Family:
    folder = max((folder for folder in folders if name.startswith(folder)), key=len)
    return Family(name, model_class, folder, folders[folder])


def _model_class(model_type: str) -> str | None:
    heads = (getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").get(model_type) for task in TASKS)
    return next(filter(None, heads), None)


def _folders() -> dict[str, bool]:
    """Map each model folder with experts of its own, or of a wrapped family, to whether they use the interface."""
    modeling = _sources("modeling")
    found = {name: True for name, source in modeling.items() if "use_experts_implementation" in source}
    found |= dict.fromkeys(OUTSIDE & modeling.keys(), False)
    wrapped = {name: _wrapped(source) & found.keys() for name, source in _sources("configuration").items()}
    return {name: all(found[inner] for inner in inners) for name, inners in wrapped.items() if inners} | found


def _sources(kind: str) -> dict[str, str]:
    sources: dict[str, str] = defaultdict(str)
    for path in sorted(Path(models.__path__[0]).glob(f"*/{kind}_*.py")):
        sources[path.parent.name] += path.read_text()
    return sources


def _wrapped(source: str) -> set[str]:
    """Return the model types that a configuration module takes from other families by default."""
    return set(re.findall(r'SubConfigSpec\(\s*config_class=AutoConfig,\s*model_type="(\w+)"', source))


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a model of the caller's own: a copy of the tiny one of a family, which is made once in a process."""
    return copy.deepcopy(_built(name, seed)).to(DEVICE)


@functools.cache
def _built(name: str, seed: int) -> PreTrainedModel:
    return construct(name, seed)


def construct(name: str, seed: int = 0) -> PreTrainedModel:
    """Build the tiny model of a family, in evaluation mode, as a function of the seed."""
    family = next(family for family in families() if family.name == name)
    module = importlib.import_module(f"transformers.models.{family.folder}.modeling_{family.folder}")
    model_class = getattr(module, family.model_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(_tiny(model_class.config_class()))
    _randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


def _tiny(default: PreTrainedConfig, tokens: list[str] | None = None) -> PreTrainedConfig:
    """Make the small counterpart of a configuration and of all inside it; `tokens` collects special token names."""
    tokens = ["pad_token_id", "bos_token_id", "eos_token_id"] if tokens is None else tokens
    declared = {default.attribute_map.get(field.name, field.name) for field in fields(default)}
    declared -= {field.name for field in fields(PreTrainedConfig)}
    small = {name: _small(name, default, tokens) for name in sorted(declared & vars(default).keys())}
    # Lists, dictionaries and nulls that need no change are left out: the class derives them from the small sizes.
    plain = {name for name, value in small.items() if isinstance(value, int | float | str)}
    changed = {name for name, value in small.items() if value is not vars(default)[name]}
    return type(default)(**{name: small[name] for name in plain | changed} | OVERRIDES.get(type(default).__name__, {}))


def _small(name: str, config: PreTrainedConfig, tokens: list[str]) -> Any:
    match value := vars(config)[name]:
        case PreTrainedConfig():
            return _tiny(value, tokens)
        case None | False:
            return _unset(name, value)
        case list() if len(value) == vars(config).get("num_hidden_layers"):
            return _few_layers(value)
        case int() if name.endswith(("_id", "_token_index")):
            return _token(name, tokens)
        case int() if value is not True:
            return _size(name, value, vars(config).get("num_attention_heads"))
    return value


def _unset(name: str, value: bool | None) -> bool | int | None:
    if name in EXPERT_FIELDS:
        return NUM_EXPERTS
    return 2 if name in TOP_K_FIELDS else UNSET.get(name, value)


def _few_layers(values: list[Any]) -> list[Any]:
    """Shorten a list with one entry per layer: each kind once, in order, and the commonest one as often as fits."""
    kinds = list(dict.fromkeys(values))[:NUM_LAYERS]
    common = max(kinds, key=Counter(values).__getitem__)
    place = kinds.index(common)
    return kinds[:place] + [common] * (NUM_LAYERS - len(kinds)) + kinds[place:]


def _token(name: str, tokens: list[str]) -> int:
    if name not in tokens:
        tokens.append(name)
    return tokens.index(name)


def _size(name: str, value: int, num_attention_heads: int | None) -> int:
    if name in EXPERT_FIELDS:
        return NUM_EXPERTS
    if name in TOP_K_FIELDS:
        return value if value <= 4 else 3
    if name == "num_key_value_heads":
        return SIZES["num_attention_heads"] if value == num_attention_heads else min(value, 2)
    if "vocab_size" in name:
        return min(value, VOCAB_SIZE)
    return min(value, SIZES.get(name, SIZES["hidden_size"] if re.search("hidden|dim|rank|width", name) else value))


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Spread all weights so far that every expert and every routing decision shows in the logits."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # Vectors are norms, biases and decay rates, which stay near their initial value.
        parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.05 * noise)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            buffer.normal_(0, 0.05, generator=generator)
        elif name.endswith("balancing_biases"):
            # Loading sets the last one back to -1, and only their differences matter.
            buffer[:-1].normal_(-1, 0.05, generator=generator)
        elif name.endswith("tid2eid"):
            buffer.copy_(torch.rand(len(buffer), NUM_EXPERTS, generator=generator).topk(buffer.shape[1]).indices)


def inputs(
    name: str, model: PreTrainedModel, *, batch_size: int = 2, sequence_length: int = 12, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Make a batch of random text for `model(**batch)`, its last row padded on the right by three positions."""
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, sequence_length)
    batch = {
        key: torch.randint(FIRST_TEXT_TOKEN, VOCAB_SIZE, shape, generator=generator)
        for key in ("input_ids", "decoder_input_ids")
        if key in accepted
    }
    if "attention_mask" in accepted:
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
        batch["attention_mask"][-1, -3:] = 0
    if name == "qwen3_omni_moe_talker":
        ids = batch.pop("input_ids").to(model.device)
        batch["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    return {key: tensor.to(DEVICE) for key, tensor in batch.items()}


PAGE = """# Families

Found in the installed Transformers by their experts, not by a list of names.
`tests/modeling/test_families_roundtrip.py` builds each one small and takes it through statistics, plan, merge, save,
a fresh process without this package, and the same logits. A family that a later Transformers adds and that follows
its experts interface needs no code here.

The last column is the plain checkpoint of fewer experts ([serving.md](serving.md)), which
`tests/export/test_plain_families.py` reads with Transformers alone. Routers that pick among groups need as many
experts in each of them.

Shared experts stay as they are, and so do the experts of vision, audio and speech parts: multimodal models are
compressed in their text part.

This page is written by `python tests/families.py > docs/families.md`, and a test compares it with the installed
Transformers.

| family | class built | experts | supported | plain |
|---|---|---|---|---|
"""
# Families of which a merged model has no plain checkpoint but one with all of its router's rows, and why.
NO_FEWER_ROWS = {
    "deepseek_v4": "its router sends tokens of the vocabulary to fixed experts",
    "ernie4_5_vl_moe": "its experts of images have the same number",
    "jetmoe": "its attention has experts of the same number",
}


def families_page() -> str:
    """Return the page of the families: how the experts of each are stored, or why they cannot be merged."""
    rows = (f"| {family.name} | `{family.model_class}` | {_support(family)} |\n" for family in families())
    return PAGE + "".join(rows)


def _support(family: Family) -> str:
    try:
        model = build(family.name)
        layouts = dict.fromkeys(map(_layout, moe_layers(model)))
        config_class_for(type(model.config).model_type)
    except ValueError as error:
        return f"| no: {str(error).rpartition('cannot be merged: ')[2].rstrip('.')} |"
    plain = f"expanded alone: {NO_FEWER_ROWS[family.name]}" if family.name in NO_FEWER_ROWS else "yes"
    return f"{'; '.join(layouts)} | yes | {plain}"


def _layout(layer: MoELayer) -> str:
    """Describe a container: behind the library's experts interface, with what is not its default, or our adapter."""
    flags, container = vars(layer.container), f"`{type(layer.container).__name__}`"
    if "has_gate" not in flags:
        return f"{container}, own adapter"
    normal = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    words = {
        "has_gate": "no gate",
        "is_concatenated": "interleaved",
        "is_transposed": "transposed",
        "has_bias": "bias",
    }
    return ", ".join([f"{container}, interface", *(words[key] for key in words if flags[key] != normal[key])])


if __name__ == "__main__":
    print(families_page(), end="")
