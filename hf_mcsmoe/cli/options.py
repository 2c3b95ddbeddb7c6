"""Options that commands share, and options made from the fields of dataclasses, where each is described once."""

import functools
import inspect
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import torch
import typer
from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_mcsmoe.cli.display import console
from hf_mcsmoe.layers.output import Read, check_output, check_path
from hf_mcsmoe.low_rank.config import KEEP, LoSparseConfig
from hf_mcsmoe.methods.config import MergeConfig, help_of, option_help
from hf_mcsmoe.modeling.folders_mcsmoe import working_folder
from hf_mcsmoe.processes import current
from hf_mcsmoe.sparsity.config import SparsityConfig

Model = Annotated[str, typer.Argument(help="folder or Hub id of the model", metavar="MODEL")]
BaseModel = Annotated[
    str | None,
    typer.Option(
        help="folder or Hub id of the checkpoint that the model was trained from, for router_norm_change",
        rich_help_panel="Data",
    ),
]
Experts = Annotated[str, typer.Option(help=option_help("experts"), rich_help_panel="Merge")]
Overwrite = Annotated[bool, typer.Option(help="write into a folder that is not empty", rich_help_panel="Output")]
Tokenizer = Annotated[str | None, typer.Option(help="tokenizer, if not the model's own", rich_help_panel="Loading")]
DEQUANTIZE = "load quantized weights (FP8, MXFP4 ...) as those that they stand for"
Dequantize = Annotated[bool, typer.Option(help=DEQUANTIZE, rich_help_panel="Loading")]
# Outputs of this run, given free when it ends.
CLAIMS = ExitStack()
# Dtypes to load in, by name.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
# Ways of Accelerate to spread a model over what there is.
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
# What numpy, which the Trainer seeds as well, takes.
LAST_SEED = 2**32 - 1
DeviceMap = Annotated[
    str | None, typer.Option(help="where to load the model: cpu, cuda, auto ...", rich_help_panel="Loading")
]


def described(default: Any, text: str, **settings: Any) -> Any:
    """Return a field that becomes an option of the command line, with its description and settings of Typer.

    Args:
        default: MISSING for an option that must be given.
    """
    return field(default=default, metadata={"help": text, "typer": settings})


@dataclass(frozen=True)
class Selection:
    """How many experts to keep, and in which layers."""

    experts: str = described("0.5", option_help("experts"))
    skip: list[str] | None = described(None, option_help("skip"))

    def apply(self, config: MergeConfig) -> MergeConfig:
        """Return the configuration with this choice.

        Raises:
            ValueError: `experts` is no number, or one out of range.
        """
        return replace(config, experts=parse_experts(self.experts), skip=tuple(self.skip or ()))


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    tokenizer: str | None = described(None, "tokenizer, if not the model's own")
    dtype: str = described("auto", "dtype to load and save in: auto, float32, bfloat16 ...")
    device_map: str | None = described(None, "where to load the model: cpu, cuda, auto ...")
    dequantize: bool = described(False, DEQUANTIZE)


@dataclass(frozen=True)
class Output:
    """Where the result goes."""

    output: Path = described(MISSING, "folder to write the model to")
    overwrite: bool = described(False, "write into a folder that is not empty")
    push_to_hub: str | None = described(None, "also upload, to this repository of the Hub")

    def claimed(self, needed_bytes: int = 0, **read: Read) -> Path:
        """Return the folder to write, checked and kept from other runs until the command ends; see `claimed`."""
        return claimed(self.output, self.overwrite, needed_bytes, **read)

    def __post_init__(self) -> None:
        """Refuse, before any work, a repository that could not be pushed to.

        Raises:
            ValueError: it has no name of the Hub, or nobody is logged in.
        """
        if self.push_to_hub is None:
            return
        try:
            validate_repo_id(self.push_to_hub)
        except HFValidationError as error:
            raise ValueError(f"--push-to-hub {self.push_to_hub!r} is no name of a repository: {error}") from None
        if get_token() is None:
            raise ValueError(f"--push-to-hub {self.push_to_hub} needs a token of the Hub: run `hf auth login` first.")

    def push(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Upload the model, and a tokenizer that is not its own, if that is asked for."""
        if self.push_to_hub:
            console.print(f"uploaded: {cast(Any, model).push_to_hub(self.push_to_hub, tokenizer=tokenizer)}")


def claimed(output: Path, overwrite: bool, needed_bytes: int = 0, **read: Read) -> Path:
    """Return an output folder that was checked, and is kept from other runs until the command ends.

    Of several processes the first one does that, which writes.

    Args:
        read: the folders, files and Hub ids that the command reads, by what they are called.

    Raises:
        ValueError: see `check_output`, or another run is writing there.
    """
    if not current().is_first:
        return output
    apart = {f"the {what.replace('_', ' ')}": names for what, names in read.items()}
    target = check_output(output, overwrite=overwrite, needed_bytes=needed_bytes, apart=apart)
    CLAIMS.enter_context(working_folder(Path(os.path.realpath(target))))
    return target


def check_file(file: Path, option: str) -> Path:
    """Return a file that an option names after making sure that it can be written.

    Raises:
        ValueError: it is a folder, its folder is missing or closed, or no disk takes its name.
    """
    path = check_path(file)
    if path.is_dir():
        raise ValueError(f"{option} {file} is a folder: name a file.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{option} {file} cannot be written: its folder is missing or closed.")
    return path


@dataclass(frozen=True)
class Storage:
    """How experts are stored."""

    rank: int | None = described(None, "store merged experts as low rank + sparse (MC-SMoE) of this rank, e.g. 32")
    keep: float | None = described(None, option_help("keep", LoSparseConfig) + f", {KEEP} unless given otherwise")

    def low_rank(self, **options: Any) -> LoSparseConfig | None:
        """Return how they become low rank + sparse; None where they stay dense.

        Raises:
            ValueError: a number out of range, or a share of S without a rank.
        """
        if self.rank is None and self.keep is not None:
            raise ValueError(f"--keep {self.keep} is a share of S, which only --rank stores: give --rank as well.")
        if self.rank is None:
            return None
        return LoSparseConfig(rank=self.rank, keep=KEEP if self.keep is None else self.keep, **options)


@dataclass(frozen=True)
class Inside:
    """What is left out inside experts."""

    sparsify: str | None = described(None, option_help("score", SparsityConfig))
    pattern: str | None = described(
        None, option_help("pattern", SparsityConfig), show_default=f"with --sparsify {SparsityConfig.pattern}"
    )
    sparsity: float | None = described(
        None, option_help("share", SparsityConfig), show_default=f"with --sparsify {SparsityConfig.share}"
    )

    def config(self, skip: Sequence[str] = ()) -> SparsityConfig | None:
        """Return what is left out inside experts; None for nothing.

        Raises:
            ValueError: a name or a share that is none, or one of them without a score.
        """
        given = {"pattern": self.pattern, "share": self.sparsity}
        known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.sparsify is None:
            if known:
                option = "--pattern" if "pattern" in known else "--sparsity"
                raise ValueError(
                    f"{option} {next(iter(known.values()))} is about weights that --sparsify leaves out: give that as "
                    f"well, e.g. --sparsify {SparsityConfig.score}."
                )
            return None
        return SparsityConfig(score=self.sparsify, skip=tuple(skip), **known)


def options_of(
    config: type, into: str, names: list[str] | None = None, *, panel: str | None = None
) -> Callable[[Callable], Callable]:
    """Return a decorator that gives a command an option for each field of a dataclass.

    Default and description are the field's (`metadata["help"]`; `metadata["typer"]` holds further settings of the
    option). The command gets them together, as an instance of `config`, in its argument `into`.

    Args:
        names: the fields to offer, by default all; the others keep their defaults.
        panel: the heading that they stand under in the help of a command.
    """
    chosen = [item for item in fields(config) if names is None or item.name in names]
    added = [_parameter(item, get_type_hints(config)[item.name], panel) for item in chosen]

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            values = {item.name: given.pop(item.name) for item in chosen}
            for name, value in values.items():
                _check_finite(name, value)
            command(**given, **{into: config(**values)})

        own = inspect.signature(command)
        parameters = [[item] if name != into else added for name, item in own.parameters.items()]
        # By name only, for then those without a default may stand behind others.
        named = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for part in parameters for item in part]
        run.__signature__ = own.replace(parameters=named)  # type: ignore[attr-defined]
        return run

    return decorate


def _check_finite(name: str, value: Any) -> None:
    """Raise ValueError where a number is `nan` or `inf`, which the bounds of an option let through."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--{name.replace('_', '-')} {value} is no number to compute with: give a finite one.")


def _parameter(item: Field, hint: Any, panel: str | None) -> inspect.Parameter:
    # A method is given by name here, where the dataclass would take a callable as well.
    hint = str | None if "registry" in item.metadata else hint  # a callable cannot be typed
    kind = hint if item.default is None or item.default is MISSING else type(item.default)
    settings = {"help": help_of(item), "rich_help_panel": panel, **item.metadata.get("typer", {})}
    declared = settings.pop("names", ())
    annotation = Annotated[kind, typer.Option(*declared, **settings)]  # type: ignore[valid-type]
    default = inspect.Parameter.empty if item.default is MISSING else item.default
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def parse_experts(text: str) -> int | float:
    """Return the number of experts: "8" is a count per layer, "0.5" a share.

    Raises:
        ValueError: neither.
    """
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ValueError(f"--experts {text!r} is neither a whole number (8) nor a share (0.5).") from None


def check_device_map(device_map: str | None, option: str = "--device-map") -> None:
    """Raise ValueError where a device map is neither a way of spreading a model nor a device."""
    if device_map is None or device_map in SPREAD:
        return
    try:
        torch.device(device_map)
    except RuntimeError:
        raise ValueError(
            f"{option} {device_map!r} is no device of torch (cpu, cuda, cuda:1), nor one of {', '.join(SPREAD)}."
        ) from None


def itemsize(dtype: str, model: PreTrainedModel, option: str = "--dtype") -> int:
    """Return the bytes of a parameter in a dtype given by name; "auto" is the model's own.

    Raises:
        ValueError: torch has no such floating-point dtype.
    """
    check_dtype(dtype, option)
    return model.dtype.itemsize if dtype == "auto" else DTYPES[dtype].itemsize


def check_dtype(dtype: str, option: str = "--dtype") -> None:
    """Raise ValueError where torch has no such floating-point dtype."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"{option} {dtype!r} is no floating-point dtype of torch (auto, {', '.join(DTYPES)}).")
