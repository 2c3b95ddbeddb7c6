"""What the tests of the scripts share."""

from pathlib import Path

import pytest
from copa import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a tiny Switch with its tokenizer, and files to train and evaluate on."""
    return write_folder(tmp_path)
