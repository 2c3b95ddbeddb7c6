"""Weights stored in 8, 4, 3 or 2 bits. This file travels with every checkpoint.

A weight called `name` of G experts, [G, out, in] whatever the family's layout, becomes

- `<name>_packed` int32 [G, out, words]: its values v in [-2^(b-1), 2^(b-1) - 1] as v + 2^(b-1), b bits each, one after
  another along the input axis from the lowest bit of the first word on; words = ceil(in b / 32);
- `<name>_scale` [G, out, in / group], of a dtype of its own, which casts of the model leave;
- `<name>_zero` int32 [G, ceil(out b / 32), in / group] unless it is symmetric: zero points, packed along the output
  axis; `W = (v - zero) scale`.

That is the layout "pack-quantized" of compressed-tensors. Where experts differ in bits, their words lie side by side
along the axis that is packed, without the axis of the experts; and so do the zero points of kept rows of S, [N, in].

A matrix is unpacked when something is multiplied by it, and not kept after that, nor for a backward pass.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .configuration_mcsmoe import check_quantized

# Codes that are split off one unit of memory: a byte, of 3 bits three.
PLACES = {8: 1, 4: 2, 3: 8, 2: 4}
# Weights that a processor dequantizes at a time, for each thread: 2 MB, which fit its cache.
BLOCK = 2**19
# Tokens from which on the output of a block is written row by row: MKL takes up to eight times as long to write a few
# columns so, and a little less for many.
MANY = 16


def num_words(count: int, bits: int) -> int:
    """Return the words that `count` values of so many bits take."""
    return math.ceil(count * bits / 32)


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the values int8 [..., count] that are packed in `words` int32 [..., words]."""
    codes = torch.stack(pieces(words, bits, count), -1).flatten(-2)[..., :count]
    return (codes ^ 2 ** (bits - 1)).view(torch.int8) if bits == 8 else codes.to(torch.int8) - 2 ** (bits - 1)


def pieces(words: torch.Tensor, bits: int, count: int) -> list[torch.Tensor]:
    """Return the codes v + 2^(b-1) of `words` int32 [..., words] by their places in what is split without a copy.

    Those are bytes of 8 / b codes, and with 3 bits three bytes of 8; each place is a tensor uint8 [..., n].
    """
    return _split_octets(_octets(words, bits, count), bits)


def _octets(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the bytes that `count` codes lie in, as whole units."""
    size = 3 * math.ceil(count / 8) if bits == 3 else math.ceil(count * bits / 8)
    octets = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], 4 * words.shape[-1])
    return nn.functional.pad(octets, (0, size - octets.shape[-1])) if size > octets.shape[-1] else octets[..., :size]


def _split_octets(octets: torch.Tensor, bits: int) -> list[torch.Tensor]:
    if bits == 8:
        return [octets]
    if bits == 3:
        first, second, third = octets.unflatten(-1, (-1, 3)).movedim(-1, 0).contiguous()
        halves = first >> 6 | (second & 1) << 2, second >> 7 | (third & 3) << 1
        low, high = [first & 7, first >> 3 & 7, halves[0]], [halves[1], third >> 2 & 7, third >> 5]
        return [*low, second >> 1 & 7, second >> 4 & 7, *high]
    last = 8 - bits
    return [
        octets & 2**bits - 1,
        *(octets >> shift & 2**bits - 1 for shift in range(bits, last, bits)),
        octets >> last,
    ]


@dataclass(frozen=True)
class QuantizedMatrix:
    """One matrix [out, in]: `packed` int32 [out, words], `scale` [out, groups], `zero` int32 [words, groups] or None.

    Or with `is_transposed` its transpose.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    width: int
    is_transposed: bool = False

    def __len__(self) -> int:
        return self.width if self.is_transposed else len(self.scale)

    @property
    def mT(self) -> "QuantizedMatrix":  # noqa: N802
        """The transpose."""
        return replace(self, is_transposed=not self.is_transposed)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix, each of whose values is rounded once."""
        exact = torch.promote_types(dtype, self.scale.dtype)
        values = unpacked(self.packed, self.bits, self.width).to(exact).unflatten(-1, (self.scale.shape[-1], -1))
        if self.zero is not None:
            values = values - unpacked(self.zero.mT, self.bits, len(self.scale)).mT.to(exact)[..., None]
        matrix = (values * self.scale.to(exact)[..., None]).flatten(-2).to(dtype)
        return matrix.mT if self.is_transposed else matrix

    def __matmul__(self, states: torch.Tensor) -> torch.Tensor:
        return self(states.mT).mT

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Map `states` [..., in] to [..., out], in their dtype."""
        return _Linear.apply(states, self)

    def product(self, states: torch.Tensor) -> torch.Tensor:
        """Do what a call does, without a gradient."""
        group, places = self.width // self.scale.shape[-1], PLACES[self.bits]
        if states.device.type == "cpu" and states.dtype != torch.float64 and group % places == 0 and len(self.scale):
            flat = states.reshape(-1, states.shape[-1])
            output = (
                _in_blocks_transposed(self, flat.float()) if self.is_transposed else _in_blocks(self, flat.float())
            )
            return output.to(states.dtype).view(*states.shape[:-1], output.shape[-1])
        return nn.functional.linear(states, self.dequantized(states.dtype))


class _Linear(torch.autograd.Function):
    """A product with a frozen matrix, which the backward pass dequantizes anew."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, matrix: QuantizedMatrix) -> torch.Tensor:
        ctx.matrix, ctx.dtype = matrix, states.dtype
        return matrix.product(states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.matrix.mT.product(gradient).to(ctx.dtype), None


def _in_blocks(matrix: QuantizedMatrix, states: torch.Tensor) -> torch.Tensor:
    """Return `states` float32 [n, in] times a matrix [out, in], dequantized some rows at a time: [n, out].

    These stay in the cache of a processor, which takes a third of the time of the whole. A code counts as it is, from
    0 on; what that is too much follows from the sums of each group's inputs. So the product differs by rounding, about
    1e-6 of its size in float32, from that with the matrix dequantized.
    """
    (out, groups), count = matrix.scale.shape, len(states)
    by_place = states.unflatten(-1, (-1, PLACES[matrix.bits])).movedim(-1, 0).contiguous()
    output = states.new_zeros(count, out).mT if count < MANY else states.new_zeros(out, count)
    scale = matrix.scale.float()
    for rows, place, block in _blocks(matrix, scale):
        output[rows].addmm_(block, by_place[place].mT)
    offsets, times = _offsets(matrix, scale)
    return torch.addmm(output.mT, states.unflatten(-1, (groups, -1)).sum(-1), offsets.mT, alpha=-times)


def _in_blocks_transposed(matrix: QuantizedMatrix, states: torch.Tensor) -> torch.Tensor:
    """Return `states` float32 [n, out] times the transpose of a matrix [out, in]: [n, in]; see `_in_blocks`."""
    places, scale = PLACES[matrix.bits], matrix.scale.float()
    output = states.new_zeros(places, len(states), matrix.width // places)
    for rows, place, block in _blocks(matrix, scale):
        output[place].addmm_(states[:, rows], block)
    offsets, times = _offsets(matrix, scale)
    by_group = output.movedim(0, -1).flatten(-2).unflatten(-1, (scale.shape[-1], -1))
    return by_group.sub((states @ offsets)[..., None], alpha=times).flatten(-2)


def _blocks(matrix: QuantizedMatrix, scale: torch.Tensor) -> Iterator[tuple[slice, int, torch.Tensor]]:
    """Yield rows, one of the places of `pieces`, and float32 [rows, n] the codes from 0 on there times the scales.

    Each block is gone when the next is asked for.
    """
    (out, groups), places = scale.shape, PLACES[matrix.bits]
    width = matrix.width // places
    size, run = min(out, max(1, BLOCK * torch.get_num_threads() // width)), width // groups
    octets, block = _octets(matrix.packed, matrix.bits, matrix.width), scale.new_empty(size, width)
    for start in range(0, out, size):
        rows, block = slice(start, min(start + size, out)), block[: out - start]
        scaled, factors = block.view(-1, groups, run), scale[rows, :, None]
        if places == 8:  # runs of weights with one scale are too short for a broadcast
            scaled, factors = block, factors.expand(-1, -1, run).flatten(1)
        for place, codes in enumerate(_split_octets(octets[rows], matrix.bits)):
            block.copy_(codes)
            scaled.mul_(factors)
            yield rows, place, block


def _offsets(matrix: QuantizedMatrix, scale: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return what each group's weights are too large by where codes count from 0 on: [out, groups], times a number."""
    middle = 2 ** (matrix.bits - 1)
    if matrix.zero is None:
        return scale, middle
    return scale * (unpacked(matrix.zero.mT, matrix.bits, len(scale)).mT.float() + middle), 1


@dataclass(frozen=True)
class QuantizedStack:
    """The matrices of all experts: `packed`, `scale`, `zero` and `bits` to be indexed by expert, as is the whole."""

    packed: Sequence[torch.Tensor]
    scale: Sequence[torch.Tensor]
    zero: Sequence[torch.Tensor] | None
    bits: Sequence[int]
    width: int

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, expert: int) -> QuantizedMatrix:
        zero = None if self.zero is None else self.zero[expert]
        return QuantizedMatrix(self.packed[expert], self.scale[expert], zero, self.bits[expert], self.width)

    def __iter__(self) -> Iterator[QuantizedMatrix]:
        return (self[expert] for expert in range(len(self)))


def taken_apart(
    tensors: Sequence[torch.Tensor | None], bits: list[int], rows: list[int], width: int
) -> QuantizedStack:
    """Return the stack that is stored as `tensors`: packed, scale, and zero or None.

    Args:
        bits: of each expert.
        rows: of each expert's matrix.
        width: in.
    """
    packed, scale, zero = tensors
    if packed.ndim == 3:
        return QuantizedStack(packed, scale, zero, bits, width)
    if scale.ndim == 2:
        packed, scale = packed.split(rows), scale.split(rows)
    else:
        packed = packed.split([num_words(width, number) for number in bits], dim=-1)
    if zero is not None:
        zero = zero.split([num_words(out, number) for out, number in zip(rows, bits, strict=True)])
    return QuantizedStack(packed, scale, zero, bits, width)


def _grouped(
    states: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    ends: torch.Tensor,
    bits: list[int],
    rows: list[int],
    width: int,
    is_transposed: bool,
) -> torch.Tensor:
    """Multiply `states`, sorted by expert, each by its expert's matrix, or by the transpose.

    Args:
        states: [N, in], or [N, rows] of as many as the tallest matrix has.
        ends: int [G], where the states of each expert end; those after the last belong to none.

    Returns:
        [N, rows] or [N, in], with zeros where a matrix has no row.
    """
    output, start = _grouped_shape(states, packed, scale, zero, ends, bits, rows, width, is_transposed).zero_(), 0
    stack = taken_apart((packed, scale, zero), bits, rows, width)
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            matrix, own = stack[expert], states[start:end]
            if is_transposed:
                output[start:end] = matrix.mT.product(own[:, : len(matrix)])
            else:
                output[start:end, : len(matrix)] = matrix.product(own)
        start = end
    return output


def _grouped_shape(states: torch.Tensor, *others: Any) -> torch.Tensor:
    *_, rows, width, is_transposed = others
    return states.new_empty(len(states), width if is_transposed else max(rows))


def _keep_inputs(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, packed, scale, zero, ends, *ctx.sizes, ctx.is_transposed = inputs
    ctx.save_for_backward(packed, scale, zero, ends)


def _grouped_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    found = torch.ops.mcsmoe.quantized_product(gradient, *ctx.saved_tensors, *ctx.sizes, not ctx.is_transposed)
    return found, *[None] * 8


# An operation that a compiler does not look into; once in a process, however many checkpoints bring this file.
if not hasattr(torch.ops.mcsmoe, "quantized_product"):
    torch.library.custom_op(
        "mcsmoe::quantized_product",
        _grouped,
        mutates_args=(),
        schema=(
            "(Tensor states, Tensor packed, Tensor scale, Tensor? zero, Tensor ends, int[] bits, int[] rows, "
            "int width, bool is_transposed) -> Tensor"
        ),
    )
    torch.library.register_fake("mcsmoe::quantized_product", _grouped_shape)
    torch.library.register_autograd("mcsmoe::quantized_product", _grouped_backward, setup_context=_keep_inputs)


def stored_shapes(entry: dict[str, Any], rows: list[int], width: int, *, in_stack: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what an entry of `quantized` stores, by the end of its name.

    Args:
        rows: of each expert's matrix.
        in_stack: whether the matrices were a tensor [G, out, in], or else [N, in].
    """
    bits, groups = entry["bits"], width // entry["group_size"]
    each = bits if isinstance(bits, list) else [bits] * len(rows)
    zeros = [num_words(out, number) for out, number in zip(rows, each, strict=True)]
    stack: tuple[int, ...] = (len(rows), rows[0]) if in_stack else (sum(rows),)
    packed, zero = (*stack, num_words(width, each[0])), (sum(zeros), groups)
    if isinstance(bits, list):
        packed = rows[0], sum(num_words(width, number) for number in bits)
    elif in_stack:
        zero = len(rows), zeros[0], groups
    return {"packed": packed, "scale": (*stack, groups)} | ({} if entry["symmetric"] else {"zero": zero})


class Quantized(nn.Module):
    """Base of experts some of whose weights are stored in few bits; the parts of low rank + sparse ones are weights.

    Its parameters require no gradient, and none of them can be trained.
    """

    # Per such weight its bits (of all experts, or a list), group size, symmetry and the dtype of its scales: an entry
    # of `config.mcsmoe`.
    quantized: dict[str, dict]

    def install_quantized(self, name: str, entry: dict[str, Any]) -> None:
        """Replace the parameter `name` by empty packed words, scales and zero points, on its device.

        Raises:
            ValueError: the module has no such matrix, or `check_quantized` refuses the entry.
        """
        if name not in self._parameters or name.endswith("bias"):
            raise ValueError(f"{type(self).__name__} has no matrix {name!r} to store in few bits.")
        rows, width, in_stack = self.matrix_rows(name), self.dense_shape(name)[-1], not _is_sparse(name)
        check_quantized(name, entry, len(rows), width, in_stack=in_stack)
        device = self._parameters.pop(name).device
        for part, shape in stored_shapes(entry, rows, width, in_stack=in_stack).items():
            dtype = getattr(torch, entry["scale_dtype"]) if part == "scale" else torch.int32
            empty = torch.empty(shape, dtype=dtype, device=device)
            setattr(self, f"{name}_{part}", nn.Parameter(empty, requires_grad=False))
        self.quantized = {**self.quantized, name: dict(entry)}

    def matrix_rows(self, name: str) -> list[int]:
        """Return the rows of each expert's matrix of a weight, stored in few bits or not.

        Raises:
            ValueError: S in its training form.
        """
        if not _is_sparse(name):
            count, out, _ = self.dense_shape(name)
            return [out] * count
        rows = self.low_rank[name.removesuffix("_s")]["kept_rows"]
        if rows is None:
            raise ValueError(f"{name!r} is in its training form: `compact` the model first, then quantize it.")
        return rows

    def quantized_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a quantized weight, [G, out, in] or [N, in]."""
        *rows, groups = self._parameters[f"{name}_scale"].shape
        return (*rows, groups * self.quantized[name]["group_size"])

    def quantized_tensors(self, name: str) -> list[torch.Tensor | None]:
        """Return packed, scale, and zero or None of a quantized weight."""
        return [getattr(self, f"{name}_{part}", None) for part in ("packed", "scale", "zero")]

    def quantized_stack(self, name: str) -> QuantizedStack:
        """Return the matrices of a quantized weight, to be indexed by expert."""
        return taken_apart(self.quantized_tensors(name), *self._sizes(name))

    def quantized_product(
        self, name: str, states: torch.Tensor, ends: torch.Tensor, *, is_transposed: bool = False
    ) -> torch.Tensor:
        """Return `states` [N, in], sorted by expert, each by its expert's matrix; see `_grouped`."""
        tensors = self.quantized_tensors(name)
        return torch.ops.mcsmoe.quantized_product(states, *tensors, ends, *self._sizes(name), is_transposed)

    def _sizes(self, name: str) -> tuple[list[int], list[int], int]:
        """Return each expert's bits and rows, and the width of all."""
        bits, rows = self.quantized[name]["bits"], self.matrix_rows(name)
        return [bits] * len(rows) if isinstance(bits, int) else bits, rows, self.quantized_shape(name)[-1]

    def init_quantized(self, std: float) -> None:
        """Initialise what a checkpoint does not bring: values at random, of the standard deviation `std` about."""
        for name, entry in self.quantized.items():
            bits = entry["bits"] if isinstance(entry["bits"], int) else min(entry["bits"])
            packed, scale, zero = self.quantized_tensors(name)
            init.constant_(scale, std * 12**0.5 / 2**bits)
            for words in (packed,) if zero is None else (packed, zero):
                init.copy_(words, torch.randint_like(words, -(2**31), 2**31))

    def _apply(self, *args: Any, **kwargs: Any) -> "Quantized":
        """Move as any module does; scales look like integers meanwhile, so that a cast leaves them."""
        for name in self.quantized:
            scale = self._parameters[f"{name}_scale"]
            scale.data = scale.data.view(torch.int16)
        try:
            super()._apply(*args, **kwargs)
        finally:  # a device may have no memory for it
            for name, entry in self.quantized.items():
                scale = self._parameters[f"{name}_scale"]
                scale.data = scale.data.view(getattr(torch, entry["scale_dtype"]))
        return self


def _is_sparse(name: str) -> bool:
    """Tell whether a weight is S of one that is low rank + sparse."""
    return name.endswith("_s")


def quantized_of(experts: nn.Module) -> dict[str, dict]:
    """Return what of the experts is stored in few bits: nothing of the library's own experts."""
    return getattr(experts, "quantized", {})


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """Yield the modules, and their paths, that store weights in few bits; each once."""
    return ((path, module) for path, module in model.named_modules() if quantized_of(module))


def uncounted(model: nn.Module) -> int:
    """Return how many more numbers the quantized weights of a module and those in it stand for than they are held as.

    Those are words, scales and zero points.
    """
    more = 0
    for _, module in quantized_modules(model):
        for name in module.quantized:
            held = [tensor.numel() for tensor in module.quantized_tensors(name) if tensor is not None]
            more += math.prod(module.quantized_shape(name)) - sum(held)
    return more


def frozen_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that quantized weights are held as."""
    for _, module in quantized_modules(model):
        for name in module.quantized:
            yield from (tensor for tensor in module.quantized_tensors(name) if tensor is not None)
