"""Batches of tokens: which of them count, where they are, and a model that runs them and is left as it was."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_mcsmoe.layers.labels import labels_are_of_tokens
from hf_mcsmoe.layers.layer import MoELayer
from hf_mcsmoe.layers.packing import apart
from hf_mcsmoe.methods.routed import Routed

Batch = Mapping[str, Any]
# Called with a layer, its tokens in one forward, which of them count, bool [T] or None for all, and the batch.
RoutedSink = Callable[[MoELayer, Routed, torch.Tensor | None, Batch], None]


def forward(model: PreTrainedModel, batch: Batch) -> Any:
    """Run the model on a batch, wherever that is, without a cache of keys and values, which only generation needs."""
    return model(**{**on_device(batch, model), **without_cache(model)})


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Return what a call of the model needs beside a batch for it to keep no cache: nothing where it knows of none.

    With a cache Transformers takes several texts packed in a row for one. Some models hand `use_cache` on to an inner
    one and do not name it themselves.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
    return {"use_cache": False} if takes_all or "use_cache" in parameters else {}


def each(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches.

    Raises:
        ValueError: there is none.
    """
    count = 0
    for count, batch in enumerate(batches, start=1):  # noqa: B007
        yield batch
    if count == 0:
        raise ValueError("The calibration set is empty: pass at least one batch.")


@contextlib.contextmanager
def hooks() -> Iterator[list[RemovableHandle]]:
    """Yield a list for the handles of hooks, which are removed after the block."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def run_routed(
    layers: Sequence[MoELayer],
    batches: Iterable[Batch],
    sink: RoutedSink,
    step: Callable[[PreTrainedModel, Batch], Any] | None = None,
) -> None:
    """Run the model of some layers over batches, and hand what each layer sees to `sink`. It is left as it was.

    Rows that are packed in a batch are run beside each other, see `apart`.

    Args:
        layers: of one model.
        step: what is done with the model and a batch; None for a forward without gradients.

    Raises:
        ValueError: no batches, or a mask of another shape than the tokens.
    """
    source = layers[0].source
    watch = Watch(source.model, sink)
    with evaluation_mode(source.model), hooks() as handles, source.streamed() as run_all:
        for layer in layers:
            handles.extend(watch.routed(layer))
        run_all(partial(watch.run, step=step), apart(source.model, each(batches)))


class Watch:
    """Hands what layers of a model see to a sink, together with the batch that is under way."""

    def __init__(self, model: PreTrainedModel, sink: RoutedSink) -> None:
        """Watch forwards of `model` that are run by `run`."""
        self.model, self.sink = model, sink
        self._current = threading.local()  # since a source may run batches in threads of their own

    def routed(self, layer: MoELayer) -> list[RemovableHandle]:
        """Hand over what a layer sees in runs of this until the returned handles are removed."""

        def take(routed: Routed) -> None:
            current = vars(self._current)
            if current:  # else another runs the model
                mask = mask_of(layer, current["masks"], len(routed.logits))
                self.sink(layer, routed, mask, current["batch"])

        return layer.routed(take)

    def run(self, batch: Batch, step: Callable[[PreTrainedModel, Batch], Any] | None = None) -> None:
        """Run a batch; `step` as for `run_routed`."""
        self._current.batch, self._current.masks = batch, token_masks(self.model, batch)
        (step or torch.no_grad()(forward))(self.model, batch)


def token_masks(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Return which tokens count, bool [batch * length], on the side of the "encoder" and of the "decoder".

    Where nothing goes to a decoder apart, both sides are the same. A side without a mask counts every token.
    """
    names_of_sides: dict[str, tuple[str, ...]] = dict.fromkeys(("encoder", "decoder"), ("attention_mask", "labels"))
    inputs = batch.get("decoder_input_ids")
    if getattr(model.config, "is_encoder_decoder", False) or inputs is not None:
        names_of_sides = {"encoder": ("attention_mask",), "decoder": ("decoder_attention_mask", "labels")}
    masks = {}
    for side, names in names_of_sides.items():
        given = {name: batch[name] for name in names if batch.get(name) is not None}
        if "labels" in given and not labels_are_of_tokens(model, batch):
            del given["labels"]
        if "decoder_attention_mask" in given and inputs is not None:
            # A block diffusion model's covers the prompt before its canvas as well.
            given["decoder_attention_mask"] = given["decoder_attention_mask"][:, -inputs.shape[1] :]
        parts = [values != (-100 if name == "labels" else 0) for name, values in given.items()]
        if any(part.ndim != 2 for part in parts):
            raise ValueError(f"{' and '.join(given)} must be [batch, length] for statistics; pass a padding mask.")
        if parts:
            masks[side] = torch.stack(parts).all(0).flatten()
    return masks


def side_of(layer: MoELayer) -> str:
    """Return the side that a layer is on, "encoder" or "decoder"; without an encoder all are on the latter."""
    return "encoder" if "encoder" in layer.name.split(".") else "decoder"


def mask_of(layer: MoELayer, masks: dict[str, torch.Tensor], tokens: int) -> torch.Tensor | None:
    """Return which of the tokens that a layer saw count, bool [T]; None for all.

    Raises:
        ValueError: the batch's mask, see `token_masks`, has another number of tokens.
    """
    mask = masks.get(side_of(layer))
    if mask is not None and len(mask) != tokens:
        raise ValueError(
            f"{layer.name} saw {tokens} tokens, the batch's mask has {len(mask)}: pass masks of the shape of the "
            "layer's input."
        )
    return mask


@contextlib.contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode (no router noise, no dropout) and back afterwards, module by module.

    Switch casts its routers to float32 in the first forward; that is undone as well.
    """
    modes = [(module, module.training) for module in model.modules()]
    dtypes = [(parameter, parameter.dtype) for parameter in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, dtype in dtypes:
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)


def on_device(batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
    """Return the batch with its tensors where the model is."""
    device = model.device if model.device.type != "meta" else torch.device("cpu")
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
