"""`hf-mcsmoe export`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer
from rich.markup import escape
from transformers import PreTrainedModel

from hf_mcsmoe.cli.display import console, notes, quality_table, stage_bars, table_of
from hf_mcsmoe.cli.options import Output, check_device_map, check_dtype, described, options_of
from hf_mcsmoe.cli.sources import Calibration
from hf_mcsmoe.cli.streaming import push_folder
from hf_mcsmoe.export.calibrate import RouterFit
from hf_mcsmoe.export.checkpoint import CHECK_KL_TO_MERGED, KL_TO_MERGED, PLAIN, SUBSTITUTED, checked, export
from hf_mcsmoe.export.engines import ENGINES, check_engine_names
from hf_mcsmoe.export.expected import Plain
from hf_mcsmoe.export.router_rows import ROUTER_ROWS, check_router_rows
from hf_mcsmoe.export.stored import PACKED
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.loading import load_model, load_tokenizer
from hf_mcsmoe.progress import Progress, one_step
from hf_mcsmoe.record import Record


@dataclass(frozen=True)
class PlainForm:
    """What becomes of a compressed model in an ordinary checkpoint."""

    engines: str = described(
        "", f"engines that must be able to run it: {', '.join(ENGINES)}", names=("--for",), show_default="none"
    )
    router_rows: str = described(
        "frequency", f"what the router's rows of a group of merged experts become: {', '.join(ROUTER_ROWS)}"
    )
    expand: bool = described(False, "put every merged expert into all of its places: the same logits, full size")
    dense: bool = described(False, "write low rank + sparse experts, and those in few bits, as dense ones")
    mxfp4: bool = described(False, "store experts of gpt-oss in MXFP4, as its own checkpoints do")
    router_steps: int = described(200, "steps of distilling the router alone on --data; 0 for the closed form", min=0)

    def __post_init__(self) -> None:
        """Refuse, before any work, names of nothing.

        Raises:
            ValueError: as said.
        """
        check_engine_names(self.names)
        check_router_rows(self.router_rows)

    @property
    def is_given(self) -> bool:
        """Whether anything is asked for."""
        return self != PlainForm()

    @property
    def names(self) -> list[str]:
        """The engines."""
        return [name.strip() for name in self.engines.split(",") if name.strip()]

    @property
    def plain(self) -> Plain:
        """The options of `export`."""
        return Plain(tuple(self.names), self.router_rows, self.expand, self.dense, self.mxfp4)


@dataclass(frozen=True)
class RouterText(Calibration):
    """The text that a plain router is fitted to; none leaves its rows as they were combined."""

    data: list[str] | None = described(  # type: ignore[assignment]
        None, "text to fit the plain router to, as of compress; may be repeated", show_default="none"
    )

    def __post_init__(self) -> None:
        """Refuse what says how to read text where none is given, or to judge on what is fitted to.

        Raises:
            ValueError: as said.
        """
        if self.data:
            super().__post_init__()
        elif self.check_data:
            raise ValueError(f"--check-data {self.check_data[0]} judges what --data fitted: give that as well.")


@dataclass(frozen=True)
class Running:
    """How a model is loaded whose router is fitted."""

    dtype: str = described("auto", "dtype to load and save in: auto, float32, bfloat16 ...")
    device_map: str | None = described(None, "where to fit the router on --data: cpu, cuda, auto ...")

    def __post_init__(self) -> None:
        """Refuse what torch does not know.

        Raises:
            ValueError: as said.
        """
        check_device_map(self.device_map)
        check_dtype(self.dtype)

    @property
    def how(self) -> dict[str, Any]:
        """The options of `load_model`."""
        return {"dtype": self.dtype, "device_map": self.device_map}


@options_of(Output, "target", panel="Output")
@options_of(PlainForm, "form", panel="Plain")
@options_of(RouterText, "text", panel="Data")
@options_of(Running, "running", panel="Loading")
def export_command(
    model: Annotated[str, typer.Argument(help="folder of a compressed model", metavar="DIR")],
    target: Output,
    form: PlainForm,
    text: RouterText,
    running: Running,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="folder or Hub id of the original, which the router imitates on --data", rich_help_panel="Data"
        ),
    ] = None,
) -> None:
    """Write a compressed model as an ordinary checkpoint of its family: fewer experts, no code of ours."""
    if base_model and not text.data:
        raise ValueError(f"--base-model {base_model} is imitated on --data: give that as well, or leave it out.")
    if running.device_map and not text.data:
        raise ValueError(
            f"--device-map {running.device_map} is where a router is fitted on --data: give that as well."
        )
    output = target.claimed(model=model, data=text.data, base_model=base_model)
    started = time.perf_counter()
    source = Folder(model, dtype=running.dtype)
    checked(source, form.names, **form.plain.stores, is_fitted=bool(text.data))
    options: dict[str, Any] = {**form.plain.options, "overwrite": target.overwrite}
    with stage_bars() as progress:
        if text.data:
            loaded, fit = _fit(model, text, form, running, base_model, progress)
            record = export(loaded, output, **options, fit=fit, progress=progress)
        else:
            record = export(source, output, **options, progress=progress)
    show_plain(record)
    console.print(f"[bold]{escape(str(output))}[/] written after {time.perf_counter() - started:.0f} s")
    push_folder(target, output)


def _fit(
    model: str, text: RouterText, form: PlainForm, running: Running, base_model: str | None, progress: Progress
) -> tuple[PreTrainedModel, RouterFit]:
    """Return the compressed model, and what its router is fitted to."""
    samples, other, tokenizer = text.read(progress), text.read_check(), load_tokenizer(model)
    with one_step("loading", progress):
        original = load_model(base_model, **running.how) if base_model else None
        loaded = load_model(model, **running.how)
    batches, held_out = text.batches(samples, tokenizer, loaded, progress)
    check = text.check_batches(other, tokenizer, loaded)
    fit = RouterFit(batches, held_out, original, form.router_steps, check=check)
    calibration = replace(fit.data, data=text.names, check=text.check_names if check else [])
    return loaded, replace(fit, calibration=calibration)


def show_plain(record: Record) -> None:
    """Print what was written, and how it does."""
    steps = [step for step in record.steps if step.title in (PACKED, PLAIN, SUBSTITUTED)]
    lines: Sequence[str] = [line for step in steps for line in step.lines]
    if record.judged and record.quality:
        console.print("\nin nats per position, on rows that no router was fitted to:", highlight=False)
        console.print(quality_table(record.quality))
        console.print()
    elif figures := steps[-1].figures:
        console.print("\nin nats per position, on rows that no router was fitted to:", highlight=False)
        console.print(table_of(_to_merged(figures)))
        console.print()
    for line in lines:
        notes.print(escape(line), highlight=False, soft_wrap=True)


def _to_merged(figures: Mapping[str, Any]) -> list[list[str]]:
    """Return a table of the divergence from the merged model, a column per stage; head first."""
    labels = {KL_TO_MERGED: "KL to the merged model", CHECK_KL_TO_MERGED: "the same, other text"}
    rows = [
        [label, *(f"{value:.4g}" for value in figures[key].values())]
        for key, label in labels.items()
        if key in figures
    ]
    return [["", *figures[KL_TO_MERGED]], *rows]
