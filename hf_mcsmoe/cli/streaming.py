"""Options of a compression block by block, and the choice of it where a model does not fit into memory."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from hf_mcsmoe.calibration.statistics import RoutingStatistics
from hf_mcsmoe.cli.display import console, notes
from hf_mcsmoe.cli.options import SPREAD, Loading, Output, described
from hf_mcsmoe.cli.sources import Calibration
from hf_mcsmoe.cli.way import Judgement, judged, refusal, run_by, stream_config
from hf_mcsmoe.forecast.needs import IN_MEMORY
from hf_mcsmoe.layers.find import Layers, check_blocks
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.layers.loading import load_config
from hf_mcsmoe.layers.stored import configured_bytes, stored_bytes
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.search.size import bytes_text
from hf_mcsmoe.streamed.config import StreamConfig
from hf_mcsmoe.streamed.journal import forget, has_written, is_begun
from hf_mcsmoe.streamed.run import digests_of


@dataclass(frozen=True)
class Streaming:
    """Whether a model is read and written block by block, and how."""

    stream: bool | None = described(
        None,
        "read and write block by block, one of them in memory; a run that was killed goes on when asked for again",
        show_default="where the model does not fit into memory",
    )
    memory: str | None = described(
        None, "memory for a block and hidden states (8GB), which else lie on disk", show_default="most of what is free"
    )
    restart: bool = described(False, "begin anew, whatever an interrupted run has finished")
    drop_source_cache: bool = described(
        False, "remove shards of a Hub id from the cache again, once no later block needs them"
    )

    def __post_init__(self) -> None:
        """Refuse, before any work, a memory that is none, and what says how to stream beside --no-stream.

        Raises:
            ValueError: as said.
        """
        self.config()
        if self.stream is False and (given := self._given()):
            raise ValueError(f"--no-stream loads the model, where {given} has nothing to say: leave out one of them.")

    def _given(self) -> str:
        """Return the options that say how to stream, as they were given."""
        names = ("memory", "restart", "drop_source_cache")
        return " and ".join([f"--{name.replace('_', '-')}" for name in names if vars(self)[name]])

    def tell_unused(self) -> None:
        """Say that options did nothing since the model is loaded."""
        if given := self._given():
            notes.print(f"the model is loaded, and {given} did nothing (--stream reads it block by block)")

    def going_on(self, output: Path) -> "Streaming":
        """Return how to stream: as a run to this output did that was interrupted, whatever fits now."""
        if self.stream is not None or not is_begun(output):
            return self
        notes.print("block by block, as the run to this output that was interrupted (--no-stream loads the model)")
        return replace(self, stream=True)

    def given(self, held: RoutingStatistics | None, output: Path) -> RoutingStatistics | None:
        """Return the statistics of a file; None where a run to this output that goes on has written them itself."""
        goes_on = held is not None and self.stream is not False and not self.restart
        return None if goes_on and has_written(output, digests_of(held)) else held

    def config(self) -> StreamConfig:
        """Return how to stream.

        Raises:
            ValueError: a memory that is none.
        """
        config = stream_config(self.memory, restart=self.restart)
        return replace(config, drop_source_cache=self.drop_source_cache)

    def is_chosen(
        self,
        layers: Layers,
        config: MergeConfig,
        stages: dict[str, Any],
        held: RoutingStatistics | None,
        calibration: Calibration,
    ) -> bool:
        """Tell whether to stream, and note it where nobody asked.

        Raises:
            ValueError: it is asked for, and cannot be done; or it cannot, and the model does not fit otherwise.
        """
        if self.stream is not None:
            return self._asked(layers)
        folder = str(layers.model.name_or_path)
        refused = refusal(layers)
        source = stored_bytes(folder) or configured_bytes(layers.model, load_config(folder))
        run = run_by(layers, config, stages, calibration, held)
        found = judged(layers, run, source.bytes, self.config(), refused=refused)
        if found.way.name == IN_MEMORY:
            return False
        check_blocks(layers)
        tell_streamed(found)
        return True

    def _asked(self, layers: Layers) -> bool:
        """Return whether to stream where options say it.

        Raises:
            ValueError: they ask for what cannot be done.
        """
        if self.stream and (refused := refusal(layers)):
            raise ValueError(refused)
        return bool(self.stream)


def tell_streamed(found: Judgement) -> None:
    """Say that a model is read block by block, and why."""
    notes.print(
        f"in memory it takes {bytes_text(found.needs[IN_MEMORY].needed)}, of which there are "
        f"{bytes_text(found.memory)}: block by block (--no-stream loads all of it)"
    )


@contextlib.contextmanager
def telling_what_is_kept(output: Path) -> Iterator[None]:
    """Say, where a signal or a full disk ends the block, that what a run to this output has finished is kept."""
    try:
        yield
    except (ValueError, TypeError):  # which say what else to do
        raise
    except BaseException:
        if is_begun(output):
            notes.print("what is finished is kept; the same command goes on", soft_wrap=True)
        raise


def forget_interrupted(output: Path) -> None:
    """Remove what an interrupted run block by block has left of a result that is complete now, and say so."""
    if forget(output):
        notes.print("removed what a run block by block to this output, which was interrupted, had finished")


def opened(model: str, loading: Loading, stream: StreamConfig, output: Path) -> Folder:
    """Return a model by folder or Hub id, to be read where the device map says, for a run to an output."""
    device = loading.device_map or "cpu"
    if device in SPREAD:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return stream.opened(model, output, dtype=loading.dtype, device=device, dequantize=loading.dequantize)


def push_folder(target: Output, folder: Path) -> None:
    """Upload a folder, if that is asked for."""
    if target.push_to_hub:
        api = HfApi()
        name = api.create_repo(target.push_to_hub, exist_ok=True).repo_id
        console.print(f"uploaded: {api.upload_folder(repo_id=name, folder_path=folder)}")
