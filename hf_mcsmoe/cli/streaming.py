"""Options of a compression block by block, and the choice of it where a model does not fit into memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from hf_mcsmoe.cli.display import console, notes
from hf_mcsmoe.cli.options import SPREAD, Loading, Output, described
from hf_mcsmoe.layers.find import Layers
from hf_mcsmoe.layers.folder import Folder
from hf_mcsmoe.methods.config import MergeConfig
from hf_mcsmoe.search.size import parse_size
from hf_mcsmoe.streamed.chain import Asked
from hf_mcsmoe.streamed.config import SHARE, StreamConfig, available_memory
from hf_mcsmoe.streamed.refused import check_streamed


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

    def config(self) -> StreamConfig:
        """Return how to stream.

        Raises:
            ValueError: a memory that is none.
        """
        memory = None if self.memory is None else parse_size(self.memory)
        if isinstance(memory, float):
            raise ValueError(f"--memory {self.memory} is a share; say how much it is (8GB).")
        return StreamConfig(memory, self.restart)

    def is_chosen(self, layers: Layers, config: MergeConfig, stages: dict[str, Any], held: Any) -> bool:
        """Tell whether to stream, and note it where nobody asked.

        Raises:
            ValueError: it is asked for, and cannot be done.
        """
        asked = Asked(**{name: value for name, value in stages.items() if name != "size"})
        if stages["size"] is not None:
            if self.stream:
                raise ValueError(
                    "--stream makes what is said, and --size (the default) tries what is best for so many bytes, for "
                    "which the model is loaded: give --experts or --bits with --experts, or leave out --stream."
                )
            return False
        if self.stream is not None:
            if self.stream:
                check_streamed(layers, config, asked, held)
            return self.stream
        size = sum(tensor.numel() for tensor in layers.model.parameters()) * layers.model.dtype.itemsize
        if size <= SHARE * available_memory() or not Path(str(layers.model.name_or_path)).is_dir():
            return False
        check_streamed(layers, config, asked, held)
        notes.print(
            f"{size / 1e9:.0f} GB of weights do not fit into the memory that is free: block by block (--no-stream "
            "loads all of them)"
        )
        return True


def opened(model: str, loading: Loading) -> Folder:
    """Return the folder of a model, to be read where the device map says."""
    device = loading.device_map or "cpu"
    if device in SPREAD:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Folder(model, dtype=loading.dtype, device=device, dequantize=loading.dequantize)


def push_folder(target: Output, folder: Path) -> None:
    """Upload a folder, if that is asked for."""
    if target.push_to_hub:
        api = HfApi()
        name = api.create_repo(target.push_to_hub, exist_ok=True).repo_id
        console.print(f"uploaded: {api.upload_folder(repo_id=name, folder_path=folder)}")
