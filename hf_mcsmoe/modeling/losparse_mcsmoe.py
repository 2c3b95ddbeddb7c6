"""Weights stored as low rank + structured sparse, `W = U V + S`. This file travels with every checkpoint.

A weight called `name` of a module becomes `<name>_u` [*, out, R], `<name>_v` [*, R, in] and S, where * is the number
of experts of a stack or nothing. S has two forms:

- training: `<name>_s` [*, out, in] and `<name>_kept` bool [*, out], the rows that are not pruned;
- compact: `<name>_s` [N, in], the N kept rows of all experts one after another, and `<name>_rows` int [N], the row of
  its expert's matrix that each of them is.

Weights in `sparse_columns` of a module keep columns of S instead: for `<name>_s` it is the transpose of S then whose
rows are meant here and elsewhere, and `in` and `out` change places. Experts do so with W_out, so that both matrices
keep hidden units.

Neither form ever multiplies U by V (LoSparse, arXiv 2306.11222; Merge, Then Compress, section 3.2).
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import initialization as init

from .configuration_mcsmoe import check_low_rank


@dataclass(frozen=True)
class SparsePart:
    """S of one weight in its training form: `weight` [*, out, in] and `kept` bool [*, out], its living rows.

    Its transpose where columns are kept.
    """

    weight: nn.Parameter
    kept: torch.Tensor


@dataclass(frozen=True)
class Factors:
    """One matrix `W = U V + S`: `u` [out, R], `v` [R, in], and S as in `SparsePart` or as kept rows and their places.

    `s` [out, in] and `kept` bool [out] in the training form, `s` [N, in] and `rows` int [N] in the compact one; with
    `columns`, `s` [in, out] and `kept` [in], or `s` [N, out] and `rows` [N]. The compact form's may be quantized.
    """

    u: Any
    v: Any
    s: Any
    kept: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    columns: bool = False

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Map `states` [..., in] to [..., out] without a matrix of the size of W, but for S in its training form."""
        # A token a column: the rows of S are then rows in memory, which are added several times as fast as columns.
        dtypes = [part.dtype for part in (self.v, self.u, self.s) if isinstance(part, torch.Tensor)]
        tokens = states.reshape(-1, states.shape[-1]).to(dtypes[0] if dtypes else states.dtype).mT
        output = self.u @ (self.v @ tokens)
        if self.columns:
            output = output + self.s.mT @ (tokens * self.kept[:, None] if self.rows is None else tokens[self.rows])
        elif self.rows is None:
            output = output + (self.s @ tokens) * self.kept[:, None]
        elif len(self.rows):
            output.index_add_(0, self.rows, self.s @ tokens)
        return output.mT.reshape(*states.shape[:-1], len(self.u))


class LowRankSparse(nn.Module):
    """Base of modules some of whose weights are stored as low rank + sparse."""

    # Per such weight its rank and, in the compact form, the kept rows per expert: an entry of `config.mcsmoe`.
    low_rank: dict[str, dict]
    # Weights of whose S columns are kept instead of rows.
    sparse_columns: tuple[str, ...] = ()

    def install_low_rank(self, name: str, rank: int, kept_rows: list[int] | None) -> None:
        """Replace the parameter `name` [*, out, in] by empty factors of its dtype, on its device.

        Args:
            kept_rows: how many rows of S each expert keeps; None for the training form.

        Raises:
            ValueError: the module has no such matrix, or `check_low_rank` refuses the numbers.
        """
        if name not in self._parameters or name.endswith("bias"):
            raise ValueError(f"{type(self).__name__} has no matrix {name!r} to store as low rank + sparse.")
        dense = getattr(self, name)
        *stack, out, width = self.dense_shape(name)
        most = width if name in self.sparse_columns else out
        entry = {"rank": rank, "kept_rows": kept_rows}
        check_low_rank(name, entry, stack[0] if stack else 1, (most, min(out, width)))
        del self._parameters[name]
        for part, shape in (("u", (*stack, out, rank)), ("v", (*stack, rank, width))):
            setattr(self, f"{name}_{part}", nn.Parameter(dense.new_empty(shape), dense.requires_grad))
        out, width = (width, out) if name in self.sparse_columns else (out, width)
        shape = (*stack, out, width) if kept_rows is None else (sum(kept_rows), width)
        setattr(self, f"{name}_s", nn.Parameter(dense.new_empty(shape), dense.requires_grad))
        if kept_rows is None:
            self.register_buffer(f"{name}_kept", torch.ones((*stack, out), dtype=torch.bool, device=dense.device))
        else:
            rows = torch.zeros(sum(kept_rows), dtype=torch.int32, device=dense.device)
            self.register_buffer(f"{name}_rows", rows)
        self.low_rank = {**self.low_rank, name: entry}

    def dense_shape(self, name: str) -> tuple[int, ...]:
        """Return (*, out, in) of a weight that is not stored as low rank + sparse, or of a factor."""
        return tuple(getattr(self, name).shape)

    def init_low_rank(self, std: float) -> None:
        """Initialise what a checkpoint does not bring: factors and biases at random, no row at a particular place."""
        for name, tensor in self.named_parameters(recurse=False):
            if tensor.is_floating_point():
                init.zeros_(tensor) if name.endswith(("_s", "bias")) else init.normal_(tensor, mean=0.0, std=std)
        for name in self.low_rank:
            if (kept := getattr(self, f"{name}_kept", None)) is not None:
                init.ones_(kept)
            else:
                init.zeros_(getattr(self, f"{name}_rows"))

    def factors(self, name: str) -> list[Factors]:
        """Return the factors of each expert's matrix; of a single matrix as a list of one."""
        counts, columns = self.low_rank[name]["kept_rows"], name in self.sparse_columns
        ends = ("u", "v", "s", "kept" if counts is None else "rows")
        parts = zip(*(self.by_expert(f"{name}_{end}") for end in ends), strict=True)
        if counts is None:
            return [Factors(u, v, s, kept, None, columns) for u, v, s, kept in parts]
        return [Factors(u, v, s, None, rows, columns) for u, v, s, rows in parts]

    def by_expert(self, name: str) -> Iterable[Any]:
        """Return each expert's part of a tensor that is one of a weight's factors."""
        weight, _, end = name.rpartition("_")
        tensor, counts = getattr(self, name), self.low_rank[weight]["kept_rows"]
        if counts is not None and end in ("s", "rows"):
            return tensor.split(counts)
        is_stack = tensor.ndim == (2 if end == "kept" else 3)
        return tensor.unbind(0) if is_stack else (tensor,)


def low_rank_modules(model: nn.Module) -> Iterator[tuple[str, LowRankSparse]]:
    """Yield the modules, and their paths, that store weights as low rank + sparse; each once."""
    for path, module in model.named_modules():
        # By name: a model loaded through remote code has a class of its own copy of this file.
        if any(cls.__name__ == LowRankSparse.__name__ for cls in type(module).__mro__) and module.low_rank:
            yield path, module


def check_rows(model: nn.Module) -> None:
    """Check the places of kept rows that a checkpoint brought; those that are offloaded are not read.

    Raises:
        ValueError: a row is none of its matrix, or kept twice.
    """
    for path, module in low_rank_modules(model):
        for name, entry in module.low_rank.items():
            if entry["kept_rows"] is None or getattr(module, f"{name}_rows").is_meta:
                continue
            rows = getattr(module, f"{name}_rows").long().cpu()
            is_column = name in module.sparse_columns
            size = module.dense_shape(f"{name}_v")[-1] if is_column else module.dense_shape(f"{name}_u")[-2]
            expert = torch.arange(len(entry["kept_rows"])).repeat_interleave(torch.tensor(entry["kept_rows"]))
            inside = bool(((rows >= 0) & (rows < size)).all())
            if not inside or len((expert * size + rows).unique()) < len(rows):
                raise ValueError(
                    f"{path}.{name}_rows names rows outside 0 to {size - 1}, or one twice: the checkpoint is damaged."
                )


def sparse_parts(model: nn.Module) -> dict[str, SparsePart]:
    """Return S of every weight that is in its training form, by its path in the model."""
    return {
        f"{path}.{name}": SparsePart(getattr(module, f"{name}_s"), getattr(module, f"{name}_kept"))
        for path, module in low_rank_modules(model)
        for name, entry in module.low_rank.items()
        if entry["kept_rows"] is None
    }


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of which this process may hold a part (FSDP2); all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def final_rows(model: nn.Module, keep: float | None) -> dict[str, torch.Tensor]:
    """Return the rows of S, bool [*, out], that the compact form of each weight in training form will hold.

    These are the kept rows; while they are more than the share `keep` of all rows of the model, those of the largest
    magnitude, under one threshold over all weights.
    """
    parts = sparse_parts(model)
    kept = {name: part.kept.clone() for name, part in parts.items()}
    total, held = sum(rows.numel() for rows in kept.values()), sum(int(rows.sum()) for rows in kept.values())
    allowed = total if keep is None else round(keep * total)
    matrices = sum(rows[..., 0].numel() for rows in kept.values())
    if held > allowed + matrices / 2:  # by more than the share of each matrix can be off by rounding
        warnings.warn(
            f"{held / total:.0%} of the rows of S are still kept, {keep:.0%} are to remain: the others are pruned by "
            "magnitude. Train with SparsificationCallback, or decompose with calibration data, to choose better.",
            stacklevel=3,
        )
        scores = [
            _whole(part.weight.detach().float().abs().mean(-1)).masked_fill(~part.kept, -1).flatten().cpu()
            for part in parts.values()
        ]
        chosen = torch.zeros(total, dtype=torch.bool)
        chosen[torch.cat(scores).argsort(descending=True, stable=True)[:allowed]] = True
        shares = chosen.split([rows.numel() for rows in kept.values()])
        kept = {name: share.view(rows.shape) for (name, rows), share in zip(kept.items(), shares, strict=True)}
    return kept


def compact_rows(part: SparsePart, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return the compact form of S: values [N, in], rows int [N], and how many rows each expert keeps.

    Args:
        kept: bool [*, out].
    """
    weight = _whole(part.weight.detach())
    kept = kept.reshape(-1, kept.shape[-1]).to(weight.device)
    values = weight.reshape(-1, weight.shape[-1])[kept.flatten()]
    return values.contiguous(), kept.nonzero()[:, 1].to(torch.int32), kept.sum(1).tolist()
