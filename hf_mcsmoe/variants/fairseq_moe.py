"""Reading checkpoints of fairseq's GPT-type Mixture-of-Experts models: a file for all, and files of experts."""

import pickle
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedConfig, PreTrainedModel, XGLMConfig

from hf_mcsmoe.variants.fairseq_moe_mcsmoe import FairseqMoeModel
from hf_mcsmoe.variants.remote_mcsmoe import become

SHARED = "-shared.pt"
# fairseq's names of activations, and Transformers' own.
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_accurate": "gelu_new", "gelu_fast": "gelu_new"}
# Options that would change the forward, without weights that would tell, and the value that is read here.
NEEDED = {
    "decoder_normalize_before": True,
    "moe_top1_expert": False,
    "no_decoder_final_norm": False,
    "no_token_positional_embeddings": False,
}
SIZES = ("decoder_layers", "decoder_attention_heads", "decoder_ffn_embed_dim")
# What files may hold beside tensors and plain values: options, and NumPy's numbers, by its older name as well.
SCALAR: Any = numpy.float64().__reduce__()[0]
SAFE: list[Any] = [
    *(Namespace, numpy.dtype, SCALAR, (SCALAR, "numpy.core.multiarray.scalar")),
    *(type(numpy.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
]
GATE = re.compile(r"decoder\.layers\.(\d+)\.moe_layer\.gate\.wg\.weight")
EXPERT = re.compile(r"decoder\.layers\.(\d+)\.moe_layer\.experts\.(\d+)\.(fc[12])\.(weight|bias)")
PARAMETERS = {
    ("fc1", "weight"): "up_proj",
    ("fc1", "bias"): "up_proj_bias",
    ("fc2", "weight"): "down_proj",
    ("fc2", "bias"): "down_proj_bias",
}
# What fairseq keeps beside weights: a version, and a buffer for the dtype of the positions.
NO_WEIGHTS = {"decoder.version", "decoder.embed_positions._float_tensor"}
EMBEDDING, HEAD, POSITIONS = (
    "decoder.embed_tokens.weight",
    "decoder.output_projection.weight",
    "decoder.embed_positions.weight",
)


@torch.no_grad()
def convert_fairseq_moe(checkpoint: str | Path) -> PreTrainedModel:
    """Return the model of a fairseq checkpoint, with code beside its weights when it is saved.

    Tokens are numbered as fairseq's `dict.txt` numbers them; no tokenizer is made.

    Args:
        checkpoint: the file `NAME-shared.pt`, or a folder with one; `NAME-rank-N.pt` with the experts lie beside it.

    Raises:
        ValueError: a file is missing, damaged or holds other objects than tensors and options, the options are those
            of a model that is built otherwise, or the weights are not those of a model of these options.
    """
    shared_file = _shared_file(Path(checkpoint))
    shared = _load(shared_file)
    weights: dict[str, torch.Tensor] = {
        name: value for name, value in shared["model"].items() if name not in NO_WEIGHTS
    }
    if EMBEDDING not in weights:
        raise ValueError(f"{shared_file} lacks {EMBEDDING}: it is of no decoder, or damaged.")
    first = _load(_rank_file(shared_file, 0))
    args = _options(shared) or _options(first)
    _check_options(args, shared_file)
    sizes = _expert_sizes(weights, first["model"], shared_file)
    config = _config(args, weights)
    model = AutoModelForCausalLM.from_config(config, dtype=weights[EMBEDDING].dtype)
    become(model, FairseqMoeModel, {**sizes, "top_k": 2})
    parameters = dict(model.named_parameters())
    left = _fill(parameters, weights, config.model_type)
    per_rank = _local_experts(first["model"])
    for rank in range(-(-sizes["num_experts"] // per_rank)):  # files beyond these are copies
        held = first if rank == 0 else _load(_rank_file(shared_file, rank))
        left -= _fill_experts(parameters, held["model"], config.model_type, rank * per_rank)
    if left:
        raise ValueError(f"{shared_file.parent} lacks weights that its options describe, such as {min(left)}.")
    return model.eval()


def _shared_file(path: Path) -> Path:
    found = [path] if path.is_file() else sorted(path.glob(f"*{SHARED}"))
    if len(found) != 1 or not found[0].name.endswith(SHARED):
        raise ValueError(
            f"{path} must be a file NAME{SHARED} of fairseq or a folder with one, and has {len(found)}: name it."
        )
    return found[0]


def _rank_file(shared: Path, rank: int) -> Path:
    return shared.with_name(f"{shared.name.removesuffix(SHARED)}-rank-{rank}.pt")


def _load(path: Path) -> Mapping[str, Any]:
    """Return what a file of fairseq holds, with tensors that stay on disk until they are read.

    Raises:
        ValueError: it is missing, damaged, or holds other objects than tensors, numbers and options.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy it beside the others, of which each holds some of the experts.")
    try:
        with torch.serialization.safe_globals(SAFE):
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds objects besides tensors and options, which are not read: save it again with "
            f"`model` and `cfg` alone where it is trusted ({str(error).splitlines()[0]})."
        ) from error
    except (EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): copy it again.") from error
    if not isinstance(held, Mapping) or not isinstance(held.get("model"), Mapping):
        raise ValueError(f"{path} is no checkpoint of fairseq: it has no `model`.")
    return held


def _options(held: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the model that a file tells, as newer and as older versions of fairseq keep them."""
    told = held.get("args") or (held.get("cfg") or {}).get("model") or {}
    return vars(told) if isinstance(told, Namespace) else dict(told)


def _check_options(args: Mapping[str, Any], path: Path) -> None:
    if lacking := [name for name in SIZES if name not in args]:
        raise ValueError(f"{path} tells no {lacking[0]} (in `args` or `cfg.model`), so no model can be built of it.")
    for name, needed in NEEDED.items():
        if bool(args.get(name, needed)) is not needed:
            raise ValueError(f"{path} is of a model with {name}={args[name]!r}; only {needed} is read here.")
    if (activation := args.get("activation_fn", "relu")) not in ACTIVATIONS:
        raise ValueError(f"{path} has activation_fn={activation!r}; only {', '.join(ACTIVATIONS)} are read here.")
    if (policy := args.get("moe_second_expert_policy", "all")) != "all":
        warnings.warn(
            f"fairseq picks the second expert by chance here (moe_second_expert_policy={policy!r}); this model always "
            "takes the second best.",
            stacklevel=3,
        )


def _config(args: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> PreTrainedConfig:
    """Return the configuration of the dense decoder.

    Raises:
        ValueError: positions are learned and embeddings scaled, which no decoder of Transformers does.
    """
    vocab_size, hidden_size = weights[EMBEDDING].shape
    head = weights.get(HEAD, weights[EMBEDDING])
    sizes = {
        "vocab_size": vocab_size,
        "ffn_dim": args["decoder_ffn_embed_dim"],
        "activation_function": ACTIVATIONS[args.get("activation_fn", "relu")],
        "tie_word_embeddings": torch.equal(head, weights[EMBEDDING]),
        **{name: args.get(name, 0.0) for name in ("dropout", "attention_dropout")},
    }
    layers, heads = args["decoder_layers"], args["decoder_attention_heads"]
    is_scaled = not args.get("no_scale_embedding", False)
    if POSITIONS not in weights:
        length = args.get("max_target_positions") or args.get("tokens_per_sample") or 2048
        sizes |= {"d_model": hidden_size, "num_layers": layers, "attention_heads": heads}
        return XGLMConfig(**sizes, scale_embedding=is_scaled, max_position_embeddings=length)
    if is_scaled:
        raise ValueError(
            "The checkpoint has learned positions and scaled embeddings, which no decoder of Transformers has both: "
            "it cannot be converted."
        )
    length = len(weights[POSITIONS]) - 2  # behind those of padding
    sizes |= {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": heads}
    return OPTConfig(**sizes, max_position_embeddings=length, bos_token_id=0)


def _expert_sizes(shared: Mapping[str, Any], first: Mapping[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """Return which layers have experts, how many, and how wide they are."""
    gates = {int(found[1]): shared[name] for name in shared if (found := GATE.fullmatch(name))}
    widths = {
        len(value)
        for name, value in first.items()
        if (found := EXPERT.fullmatch(name)) and found.group(3, 4) == ("fc1", "weight")
    }
    counts = {len(gate) for gate in gates.values()}
    if len(counts) != 1 or len(widths) != 1:
        raise ValueError(f"{path} and the file of rank 0 hold no experts of one number and width in all layers.")
    return {"layers": sorted(gates), "num_experts": counts.pop(), "expert_dim": widths.pop()}


def _local_experts(held: Mapping[str, torch.Tensor]) -> int:
    return 1 + max(int(found[2]) for name in held if (found := EXPERT.fullmatch(name)))


def _target(name: str, base: str) -> str:
    """Return what Transformers' model of a family calls a weight that all files share."""
    if name == HEAD:
        return "lm_head.weight"
    name = name.replace(".moe_layer.gate.wg.", ".moe_layer.gate.")
    if base == "xglm":
        return name.replace("decoder.", "model.", 1)
    return "model." + name.replace("decoder.layer_norm.", "decoder.final_layer_norm.")


def _fill(parameters: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], base: str) -> set[str]:
    """Copy what all files share, and return what is left: the weights of experts, by name and number."""
    left = set(parameters)
    for name, value in weights.items():
        target = _target(name, base)
        if target != "lm_head.weight" or target in parameters:  # else it is the embedding
            _copy(parameters, target, None, value, name)
            left.discard(target)
    experts = {name for name in left if ".experts." in name}
    if lacking := left - experts:
        raise ValueError(f"The checkpoint lacks {min(lacking)}, which its options describe.")
    return {f"{name}[{expert}]" for name in experts for expert in range(len(parameters[name]))}


def _fill_experts(
    parameters: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], base: str, offset: int
) -> set[str]:
    """Copy the experts of one file, in which they are numbered from 0, and return what was filled."""
    filled = set()
    for name, value in weights.items():
        if not (found := EXPERT.fullmatch(name)):
            raise ValueError(f"The checkpoint's {name} has no place in the model of its options.")
        layer, expert, part, kind = found.groups()
        path = _target(f"decoder.layers.{layer}.moe_layer.experts.{PARAMETERS[part, kind]}", base)
        _copy(parameters, path, offset + int(expert), value, name)
        filled.add(f"{path}[{offset + int(expert)}]")
    return filled


def _copy(parameters: Mapping[str, torch.Tensor], target: str, at: int | None, value: torch.Tensor, name: str) -> None:
    place = parameters.get(target)
    if place is not None and at is not None:
        place = place[at] if at < len(place) else None
    if place is None or place.shape != value.shape:
        wanted = "has no place there" if place is None else f"should be {list(place.shape)}"
        raise ValueError(f"The checkpoint is not of the model of its options: {name} {list(value.shape)} {wanted}.")
    place.copy_(value)
