"""The command line `hf-mcsmoe`: each command has a file of its own."""

import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from transformers.utils import logging as transformers_logging

from hf_mcsmoe.cli.calibrate import calibrate_command
from hf_mcsmoe.cli.compare import compare_command
from hf_mcsmoe.cli.compress import compress_command
from hf_mcsmoe.cli.demo import demo_command
from hf_mcsmoe.cli.display import console
from hf_mcsmoe.cli.distill import distill_command
from hf_mcsmoe.cli.evaluate import evaluate_command
from hf_mcsmoe.cli.examples import epilog
from hf_mcsmoe.cli.export import export_command
from hf_mcsmoe.cli.inspect import inspect_command
from hf_mcsmoe.cli.launched import in_processes
from hf_mcsmoe.cli.methods import methods_command
from hf_mcsmoe.cli.options import CLAIMS
from hf_mcsmoe.cli.plan import plan_command
from hf_mcsmoe.cli.recipe import RENAMED, with_recipe
from hf_mcsmoe.cli.report import report_command
from hf_mcsmoe.cli.streams import Tolerant, cleaning_up_when_terminated, tolerant_streams

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        console.print(f"hf-mcsmoe {version('hf_mcsmoe')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options_of_all(
    debug: Annotated[bool, typer.Option("--debug", help="show where an error arose; goes with every command")] = False,
    is_version_asked: Annotated[
        bool, typer.Option("--version", help="show the version", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Merge the experts of Mixture-of-Experts models (M-SMoE) into checkpoints that load anywhere."""


COMMANDS: dict[str, Callable] = {
    "inspect": inspect_command,
    "plan": plan_command,
    "calibrate": calibrate_command,
    "compare": compare_command,
    "compress": compress_command,
    "distill": distill_command,
    "export": export_command,
    "evaluate": evaluate_command,
    "report": report_command,
    "methods": methods_command,
    "demo": demo_command,
}
for _name, _command in COMMANDS.items():
    app.command(_name, epilog=epilog(_name))(in_processes(_name, with_recipe(_name, _command)))


def main() -> None:
    """Run the command line; an error is one sentence and exit code 1, with its traceback under `--debug`.

    A warning is one sentence as well.
    """
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    format_of_python = warnings.formatwarning
    if not debug:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        warnings.formatwarning = _one_sentence
    try:
        with tolerant_streams() as output, cleaning_up_when_terminated(), CLAIMS:
            _run(arguments, debug, output)
    finally:
        warnings.formatwarning = format_of_python


def _run(arguments: list[str], debug: bool, output: Tolerant) -> NoReturn:
    """Run a command and end with its exit code."""
    try:
        _check_names(arguments)
        app(args=arguments, prog_name="hf-mcsmoe")
    except SystemExit as ended:
        output.flush()
        if output.error and not ended.code:
            _tell_what_is_lost(arguments, output.error)
        raise
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        expected = isinstance(error, ValueError | TypeError | OSError)
        hint = "" if expected else f" ({type(error).__name__}; --debug shows where)"
        Console(stderr=True).print(f"[red]Error:[/] {escape(text)}{hint}", highlight=False)
        sys.exit(1)
    raise AssertionError("Typer ends every command with SystemExit.")


def _check_names(arguments: list[str]) -> None:
    """Raise ValueError where an option is given by the name that it had before."""
    for old, new in RENAMED.items():
        if any(argument.partition("=")[0] == f"--{old}" for argument in arguments):
            raise ValueError(f"--{old} is called --{new} now: write that.")


def _tell_what_is_lost(arguments: list[str], error: OSError) -> None:
    """Say that what was printed is lost, and fail if nothing else was to come of it; a reader that left has enough."""
    if isinstance(error, BrokenPipeError):
        return
    kept = any(argument.split("=")[0] in ("--output", "--json") for argument in arguments)
    rest = "all else was done" if kept else "nothing else was asked for"
    Console(stderr=True).print(f"Standard output could not be written ({error.strerror}); {rest}.", highlight=False)
    if not kept:
        sys.exit(1)


def _one_sentence(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"Warning: {' '.join(str(message).split())}\n"
