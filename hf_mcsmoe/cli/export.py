"""`hf-mcsmoe export`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.markup import escape

from hf_mcsmoe.cli.display import console, notes, quality_table, stage_bars
from hf_mcsmoe.cli.options import Output, described, options_of
from hf_mcsmoe.cli.sources import Calibration
from hf_mcsmoe.cli.streaming import push_folder
from hf_mcsmoe.export.calibrate import RouterFit
from hf_mcsmoe.export.checkpoint import PLAIN, export
from hf_mcsmoe.export.engines import ENGINES, check_engine_names
from hf_mcsmoe.export.router_rows import ROUTER_ROWS, check_router_rows
from hf_mcsmoe.export.stored import PACKED
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
    def options(self) -> dict[str, Any]:
        """The options of `export`."""
        form = {"router_rows": self.router_rows, "expand": self.expand}
        return {"engines": self.names, **form, "dense": self.dense, "mxfp4": self.mxfp4}


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


@options_of(Output, "target", panel="Output")
@options_of(PlainForm, "form", panel="Plain")
@options_of(RouterText, "text", panel="Data")
def export_command(
    model: Annotated[str, typer.Argument(help="folder of a compressed model", metavar="DIR")],
    target: Output,
    form: PlainForm,
    text: RouterText,
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
    output = target.claimed(model=model, data=text.data, base_model=base_model)
    started = time.perf_counter()
    with stage_bars() as progress:
        fit = _fit(model, text, form, base_model, progress) if text.data else None
        record = export(model, output, **form.options, overwrite=target.overwrite, fit=fit, progress=progress)
    show_plain(record)
    console.print(f"[bold]{escape(str(output))}[/] written after {time.perf_counter() - started:.0f} s")
    push_folder(target, output)


def _fit(model: str, text: RouterText, form: PlainForm, base_model: str | None, progress: Progress) -> RouterFit:
    """Return what the router is fitted to."""
    samples, other, tokenizer = text.read(progress), text.read_check(), load_tokenizer(model)
    with one_step("loading", progress):
        original = load_model(base_model) if base_model else None
        known = original or load_model(model)
    batches, held_out = text.batches(samples, tokenizer, known, progress)
    check = text.check_batches(other, tokenizer, known)
    return RouterFit(batches, held_out, original, form.router_steps, check=check)


def show_plain(record: Record) -> None:
    """Print what was written, and how it does."""
    lines: Sequence[str] = [line for step in record.steps if step.title in (PACKED, PLAIN) for line in step.lines]
    if record.judged and record.quality:
        console.print("\nin nats per position, on rows that no router was fitted to:", highlight=False)
        console.print(quality_table(record.quality))
        console.print()
    for line in lines:
        notes.print(escape(line), highlight=False, soft_wrap=True)
