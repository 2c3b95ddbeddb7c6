"""How the experts of a plain checkpoint are stored: dense, in few bits as they are, or in MXFP4."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_mcsmoe.export.form import PlainForm, Slots
from hf_mcsmoe.export.mxfp4 import GROUP, mxfp4_bytes, mxfp4_config, mxfp4_experts, rounded_experts
from hf_mcsmoe.export.quantized import (
    Scheme,
    advice,
    check_readers,
    described,
    packed_bytes,
    packed_experts,
    quantization_config,
    schemes,
)
from hf_mcsmoe.export.substituted import approximate_experts, substituted_bytes, substituted_experts
from hf_mcsmoe.export.write import Experts, State, dense_experts
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.record import Record, Step

# How experts may be stored other than dense, by the name of that in the configuration.
KINDS = {"low_rank": "as low rank + sparse", "quantized": "in few bits"}
# The title of the step that tells of experts that are not dense, and the family that stores them in MXFP4.
PACKED, MXFP4_FAMILY = "Packed experts", "gpt_oss"


@dataclass(frozen=True)
class Stored:
    """What is made of a layer's experts, the bytes of all of the model's weights then, and what says how to read them.

    `config` is what the configuration gains by that; `lines` tell of it. `loaded` are the experts as dense ones, as
    whoever loads the checkpoint computes with them. `layers` holds the bytes of each layer's experts, and `bits` those
    of their weights where they are few, by the layer's name.
    """

    experts: Experts
    bytes: int
    config: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    loaded: Experts = dense_experts
    layers: Mapping[str, int] = field(default_factory=dict)
    bits: Mapping[str, dict[str, float]] = field(default_factory=dict)

    def told(self, record: Record) -> Record:
        """Return a record that tells of experts that are not dense."""
        return record.with_step(Step(PACKED, {"bytes": self.bytes}, [*self.lines])) if self.lines else record


def plain_bytes(form: PlainForm) -> int:
    """Return the bytes of a plain form's weights, dense."""
    return sum({id(tensor): tensor.nbytes for tensor in form.plain.state_dict(keep_vars=True).values()}.values())


def _dense_bytes(form: PlainForm) -> dict[str, int]:
    """Return the bytes of the experts of each layer, dense."""
    return {slot.layer.name: sum(tensor.nbytes for _, tensor in slot.plain.parameters) for slot in form.slots}


def _other_bytes(form: PlainForm) -> int:
    """Return the bytes of a plain form's weights but for its experts."""
    return plain_bytes(form) - sum(_dense_bytes(form).values())


def stored_form(form: PlainForm, engines: Sequence[str], *, dense: bool, mxfp4: bool) -> Stored:
    """Return how the experts of a plain form are to be stored.

    Raises:
        ValueError: they are low rank + sparse, or in few bits in a way that a reader does not know, and nobody asked
            to make them dense; or MXFP4 is asked for where there is none.
    """
    if any(slot.layer.num_constants for slot in form.slots):
        if dense or mxfp4:
            name = "dense" if dense else "mxfp4"
            raise ValueError(f"Experts beside constants are stored as vLLM reads them: leave {name} (--{name}) out.")
        return _substituted(form)
    layers: dict[str, Any] = form.model.config.mcsmoe["layers"]
    kinds = [kind for kind in KINDS if any(layer.get(kind) for layer in layers.values())]
    if mxfp4:
        return _in_mxfp4(form, dense or not kinds)
    if dense or not kinds:
        return Stored(dense_experts, plain_bytes(form), layers=_dense_bytes(form))
    way_out = f"written dense they take {_size(plain_bytes(form))} with the rest of the model: dense=True (--dense)."
    if "low_rank" in kinds:
        raise ValueError(
            f"The experts are stored {' and '.join(KINDS[kind] for kind in kinds)}, which no model of the family's "
            f"own class knows; {way_out}"
        )
    try:
        found = schemes(form)
        check_readers(found, engines)
        return _packed(form, found, engines)
    except ValueError as error:
        raise ValueError(f"{error} Or {way_out}") from None


def _packed(form: PlainForm, found: Mapping[str, Scheme | None], engines: Sequence[str]) -> Stored:
    """Return experts in few bits, and the dense ones beside them."""

    def experts(slots: Slots) -> State:
        return dense_experts(slots) if found[slots.layer.name] is None else packed_experts(slots)

    packed = {
        slot.layer.name: packed_bytes(slot, scheme)
        for slot in form.slots
        if (scheme := found[slot.layer.name]) is not None
    }
    entries: dict[str, Any] = form.model.config.mcsmoe["layers"]
    bits = {name: {part: item["bits"] for part, item in entries[name]["quantized"].items()} for name in packed}
    layers = _dense_bytes(form) | packed
    size = _other_bytes(form) + sum(layers.values())
    line = (
        f"Experts are stored with {described(found.values())} (compressed-tensors, pack-quantized): "
        f"{_size(size)} of weights with the rest of the model. Transformers unpacks them as it loads, to "
        f"{_size(plain_bytes(form))}; engines with kernels for them keep them as they are."
    )
    lines = line, *advice(form, found, engines)
    config = {"quantization_config": quantization_config(form, found)}
    return Stored(experts, size, config, lines, layers=layers, bits=bits)


def check_mxfp4(layers: Iterable[MoELayer], *, is_dense: bool) -> None:
    """Check that the experts of a model, compressed or not, can be stored in MXFP4.

    Args:
        is_dense: whether they are dense, or are to be multiplied out.

    Raises:
        ValueError: no checkpoint of the family is stored so, or groups of 32 do not divide the experts' sizes.
    """
    layers = list(layers)
    model = layers[0].model
    if model.config.model_type != MXFP4_FAMILY:
        raise ValueError(
            f"MXFP4 is how gpt-oss stores its experts, and {type(model).__name__} has no such form: quantize with "
            "bits=4."
        )
    if not is_dense:
        raise ValueError(
            "The experts are stored in another way, and in MXFP4 they would be rounded once more: start from the "
            "model before that, or ask for it with dense=True (--dense)."
        )
    widths = {size for layer in layers for size in (layer.hidden_size, layer.intermediate_size)}
    if odd := sorted(width for width in widths if width % GROUP):
        raise ValueError(
            f"MXFP4 has a scale for {GROUP} weights, which do not divide the {odd[0]} inputs of a matrix."
        )


def _in_mxfp4(form: PlainForm, is_dense: bool) -> Stored:
    check_mxfp4((slot.plain for slot in form.slots), is_dense=is_dense)
    layers = {slot.layer.name: mxfp4_bytes(slot.plain.parameters) for slot in form.slots}
    size = _other_bytes(form) + sum(layers.values())
    line = f"Experts are stored in MXFP4, as those of gpt-oss: {_size(size)} of weights with the rest of the model."
    bits = {
        slot.layer.name: dict.fromkeys((name for name, _ in slot.plain.parameters if not name.endswith("_bias")), 4.0)
        for slot in form.slots
    }
    return Stored(
        lambda slots: mxfp4_experts(dense_experts(slots)),
        size,
        {"quantization_config": mxfp4_config()},
        (line,),
        loaded=_rounded,
        layers=layers,
        bits=bits,
    )


def _rounded(slots: Slots) -> State:
    """Return dense experts as they are after a way through MXFP4."""
    return rounded_experts(dense_experts(slots))


def _substituted(form: PlainForm) -> Stored:
    gone = approximate_experts(form)
    layers = {slot.layer.name: substituted_bytes(slot) for slot in form.slots}
    size = _other_bytes(form) + sum(layers.values())
    line = (
        f"Of the experts {sum(map(len, gone.values()))} are constants in the format of vLLM, which alone reads it: "
        f"{_size(size)} of weights."
    )
    return Stored(substituted_experts, size, {"approximate_experts": gone}, (line,), layers=layers)


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
