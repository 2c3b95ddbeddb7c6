"""The notebook runs from top to bottom, and what it shows is so."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_steps.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_runs_top_to_bottom(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    told = [line.partition("loss ") for line in text.splitlines() if "loss " in line]
    losses = {name.split()[0]: float(rest.split()[0]) for name, _, rest in told}
    assert losses["original"] < losses["repaired"] < losses["merged"]
    assert "same logits: True" in text
    assert "report.html lies beside the weights" in text
