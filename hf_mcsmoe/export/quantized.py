"""Experts in few bits in a plain checkpoint: the layout "pack-quantized" of compressed-tensors, a tensor an expert.

Our stacks have its words already, so nothing is rounded again: they are taken apart and renamed. Read from compressed-
tensors 0.20 and its integrations in Transformers 5.23, vLLM 0.33 and SGLang 0.5.23.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from hf_mcsmoe.export.form import PlainForm, Slots
from hf_mcsmoe.modeling.quantized_mcsmoe import num_words, quantized_of

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
TRANSFORMERS = "transformers"
# What vLLM and SGLang take for one of the experts that have a scheme; the shared ones are no such.
EXPERTS = r".*\.experts\..*"


@dataclass(frozen=True, order=True)
class Scheme:
    """How the experts of one layer are stored, all of their matrices alike: symmetric groups along the input axis."""

    bits: int
    group_size: int


def schemes(form: PlainForm) -> dict[str, Scheme | None]:
    """Return how the experts of each layer of the compressed model are stored; None for dense ones.

    Raises:
        ValueError: a layer has zero points, bits by expert, matrices that differ, or is low rank + sparse in few bits;
            none of the readers has a place for these.
    """
    layers: dict[str, Any] = form.model.config.mcsmoe["layers"]
    return {slot.layer.name: _scheme(slot.layer.name, layers.get(slot.layer.name, {})) for slot in form.slots}


def _scheme(name: str, entry: Mapping[str, Any]) -> Scheme | None:
    stored: dict[str, Any] = entry.get("quantized") or {}
    if not stored:
        return None
    told = f"The experts of {name} cannot be written as {METHOD} knows them"
    if entry.get("low_rank"):
        raise ValueError(f"{told}: they are low rank + sparse in few bits. Quantize the merged model without ranks.")
    if any(not matrix["symmetric"] for matrix in stored.values()):
        raise ValueError(
            f"{told}: they have zero points, which Transformers does not read for experts. Quantize with "
            "symmetric=True, as is the default."
        )
    if any(isinstance(matrix["bits"], list) for matrix in stored.values()):
        raise ValueError(f"{told}: they differ in bits from expert to expert. Quantize without low_bits.")
    found = {Scheme(matrix["bits"], matrix["group_size"]) for matrix in stored.values()}
    if len(found) > 1:
        sizes = math.gcd(*(scheme.group_size for scheme in found))
        bits = min(scheme.bits for scheme in found)
        raise ValueError(
            f"{told}: their matrices have {described(found)}, and one scheme is for all. Quantize with bits={bits} "
            f"and group_size={sizes}."
        )
    return found.pop()


@dataclass(frozen=True)
class Reader:
    """What an engine reads of experts in few bits: their `bits`, and whether layers may differ; with the source."""

    bits: tuple[int, ...]
    several: bool
    source: str


READERS = {
    TRANSFORMERS: Reader(
        (8, 4, 3, 2), False, "Transformers 5.23, integrations/compressed_tensors: get_experts_scheme"
    ),
    "vllm": Reader((8, 4), True, "vLLM 0.33, compressed_tensors_moe: schemes by layer; Marlin and Triton kernels"),
    "sglang": Reader((8, 4), True, "SGLang 0.5.23, compressed_tensors_wNa16: WNA16_SUPPORTED_BITS"),
    "llama.cpp": Reader((8, 4, 2), False, "llama.cpp, autumn 2026, conversion/base.py: dequant_packed, one group"),
    "mlx": Reader((), False, "mlx-lm 0.32.2, utils.py: for a few families alone, none of which merges"),
}


def check_readers(found: Mapping[str, Scheme | None], engines: Sequence[str]) -> None:
    """Check that engines, and unless others are named Transformers, read experts that are stored so.

    Raises:
        ValueError: one does not.
    """
    kinds = {scheme for scheme in found.values() if scheme is not None}
    for name in engines or [TRANSFORMERS]:
        reader = READERS[name]
        if other := sorted({scheme.bits for scheme in kinds} - {*reader.bits}):
            known = ", ".join(map(str, reader.bits)) or "none"
            raise ValueError(
                f"{name} does not read experts in {other[0]} bits ({reader.source}); it reads {known}. "
                f"{'Quantize with bits=4, or leave' if reader.bits else 'Leave'} that engine out."
            )
        if not reader.several and len(set(found.values())) > 1:
            raise ValueError(
                f"{name} reads one scheme for the experts of all layers ({reader.source}), and they have "
                f"{described(found.values())}. Quantize all layers with one value of bits and of group_size, or name "
                "those engines alone that take several: vllm, sglang."
            )


# Groups that the fast kernels of vLLM and SGLang (Marlin) take, and what divides the model's width there.
FAST_GROUPS, FAST_WIDTH = (32, 64, 128), 128


def advice(form: PlainForm, found: Mapping[str, Scheme | None], engines: Sequence[str]) -> list[str]:
    """Return what engines that compute with packed experts run slower, or on fewer processes; a sentence each.

    Source: vLLM 0.33, marlin_utils (`check_moe_marlin_supports_config`) and compressed_tensors_moe_wna16
    (`create_weights`); SGLang 0.5.23 takes its kernels from there.
    """
    layer, named = form.slots[0].plain, [name for name in engines if name in ("vllm", "sglang")]
    groups = sorted({scheme.group_size for scheme in found.values() if scheme is not None})
    told = []
    if slow := [group for group in groups if group not in FAST_GROUPS]:
        told.append(f"has fast kernels for groups of 32, 64 or 128 weights, not {slow[0]}")
    if layer.hidden_size % FAST_WIDTH:
        told.append(f"has fast kernels for models of a width that {FAST_WIDTH} divides, not {layer.hidden_size}")
    shares = math.gcd(*(layer.intermediate_size // group for group in groups))
    told.append(f"takes as many processes of tensor parallelism as divide {shares}")
    return [f"{name} {words}." for name in named for words in told]


def described(found: Iterable[Scheme | None]) -> str:
    """Return schemes in words: 8 bits in groups of 64 and 4 bits in groups of 64."""
    kinds = set(found)
    told = [
        f"{scheme.bits} bits in groups of {scheme.group_size}"
        for scheme in sorted(scheme for scheme in kinds if scheme is not None)
    ]
    return " and ".join([*told, *(["dense weights"] if None in kinds else [])])


def quantization_config(form: PlainForm, found: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """Return the `quantization_config` of a plain checkpoint.

    Several schemes are told apart by the numbers of blocks in the names on disk. What is no expert in few bits is
    ignored by name, for SGLang refuses a model with a layer that it finds nowhere.
    """
    targets: dict[Scheme, list[str]] = defaultdict(list)
    one = len(set(found.values())) == 1
    blocks = {slot.layer.name: _block(next(iter(disk_names(slot)))) for slot in form.slots}
    if not one and len({*blocks.values()} - {""}) < len(blocks):
        raise ValueError(
            f"The names of {type(form.plain).__name__} on disk do not tell its blocks apart by number, so layers "
            "cannot have schemes of their own: quantize all of them alike."
        )
    for name, scheme in found.items():
        if scheme is not None:
            targets[scheme].append(blocks[name])
    patterns = {scheme: EXPERTS if one else _either(blocks) for scheme, blocks in targets.items()}
    groups = {f"group_{place}": _group(scheme, patterns[scheme]) for place, scheme in enumerate(sorted(patterns))}
    ignored = "".join(f"(?!{pattern})" for pattern in patterns.values())
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [f"re:{ignored}.*"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _block(name: str) -> str:
    """Return the part of an expert's name on disk that tells its block: `layers.3`."""
    found = re.search(r"([^.]+\.\d+)\.", name)
    return "" if found is None else found.group(1)


def _either(blocks: Sequence[str]) -> str:
    return rf".*\b({'|'.join(map(re.escape, blocks))})\..*\.experts\..*"


def _group(scheme: Scheme, pattern: str) -> dict[str, Any]:
    weights = {
        **{"num_bits": scheme.bits, "type": "int", "symmetric": True, "strategy": "group"},
        **{"group_size": scheme.group_size, "dynamic": False},
    }
    unquantized = {"input_activations": None, "output_activations": None}
    return {"targets": [f"re:{pattern}"], "weights": weights, **unquantized, "format": FORMAT}


def disk_names(slots: Slots) -> dict[str, torch.Tensor]:
    """Return the matrices of a plain layer's experts by their names on disk, on the meta device, [out, in] each.

    Raises:
        ValueError: the family stores experts otherwise than by one matrix each.
    """
    plain = slots.plain
    stacks = {f"{plain.name}.{name}": parameter for name, parameter in plain.parameters}
    found = revert_weight_conversion(plain.model, {name: value.detach() for name, value in stacks.items()})
    transposed = getattr(plain.container, "is_transposed", False)
    if transposed or any(re.search(r"\.experts\.\d+\..*\.weight$", name) is None for name in found):
        raise ValueError(
            f"{type(plain.model).__name__} keeps the experts of a layer in one tensor on disk ({next(iter(found))}), "
            f"for which {METHOD} has no form in few bits."
        )
    return found


def packed_experts(slots: Slots) -> dict[str, torch.Tensor]:
    """Return the experts of a plain layer by their names on disk: words, scales and shape of each matrix.

    Scales are of the model's dtype, which Transformers gives the weights that it unpacks.

    Raises:
        ValueError: see `disk_names`; or the model's dtype cannot hold the scales.
    """
    state, shapes, dtype = {}, disk_names(slots), slots.layer.model.dtype
    with slots.layer.source.loaded(slots.layer.name) as experts:
        names, tensors = quantized_of(experts), dict(experts.named_parameters())
        places = torch.tensor(slots.stored)
        for part in ("packed", "scale"):
            stacks = {f"{slots.plain.name}.{name}": tensors[f"{name}_{part}"].detach()[places] for name in names}
            for name, tensor in revert_weight_conversion(slots.plain.model, stacks).items():
                state[f"{name}_{part}"] = tensor if part == "packed" else _scales(name, tensor, dtype)
    return state | {f"{name}_shape": torch.tensor(shape.shape) for name, shape in shapes.items()}


def packed_bytes(slots: Slots, scheme: Scheme) -> int:
    """Return the bytes of what `packed_experts` returns."""
    size = 0
    for shape in (matrix.shape for matrix in disk_names(slots).values()):
        rows, width = shape
        scales = rows * width // scheme.group_size * slots.layer.model.dtype.itemsize
        size += rows * num_words(width, scheme.bits) * torch.int32.itemsize + scales + 2 * torch.int64.itemsize
    return size


def _scales(name: str, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = scale.to(dtype)
    if not torch.equal(cast.to(torch.float64), scale.to(torch.float64)):
        raise ValueError(
            f"The scales of {name} do not fit {dtype}, as which the model was loaded: load it in {scale.dtype}."
        )
    return cast
