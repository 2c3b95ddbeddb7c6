"""Commands that `torchrun` or `accelerate launch` starts several times: the first process alone writes and tells."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

from hf_mcsmoe.cli.display import console, notes
from hf_mcsmoe.processes import started, together

# Commands whose work is shared by the processes.
SHARED = ("calibrate", "compress")


def in_processes(name: str, command: Callable) -> Callable:
    """Return a command that works together with the others that a launcher started; by itself it is as it was."""

    @functools.wraps(command)
    def run(*arguments: Any, **given: Any) -> None:
        if started() == 1:
            command(*arguments, **given)
            return
        if name not in SHARED:
            raise ValueError(
                f"hf-mcsmoe {name} works in one process, and {started()} were started: start it without a launcher. "
                f"Only {' and '.join(SHARED)} share their work; scripts with a DistillationTrainer do as well."
            )
        with together() as processes:
            console.quiet = notes.quiet = not processes.is_first
            with warnings.catch_warnings():
                if not processes.is_first:
                    warnings.simplefilter("ignore")
                try:
                    command(*arguments, **given)
                except Exception as error:
                    if not processes.tells(str(error)):
                        raise SystemExit(1) from error
                    raise

    return run
