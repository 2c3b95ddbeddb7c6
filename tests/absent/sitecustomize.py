"""Makes the package as absent as if it had never been installed, in a process with this folder in PYTHONPATH."""

import importlib.abc
import sys
from collections.abc import Sequence
from types import ModuleType


class NotInstalled(importlib.abc.MetaPathFinder):
    """Refuses the one import."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Raise what an import of a missing package raises."""
        if name.partition(".")[0] == "hf_mcsmoe":
            raise ModuleNotFoundError("No module named 'hf_mcsmoe'", name="hf_mcsmoe")


sys.meta_path.insert(0, NotInstalled())
