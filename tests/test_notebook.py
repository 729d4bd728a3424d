"""The example notebook runs from top to bottom."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parents[1] / "docs"


def test_example_runs(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # one device, as a notebook finds it
    notebook = nbformat.read(DOCS / "example.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells), "stored without its outputs"
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(DOCS)}})
    client.execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "Did you mean 'weight_decay'?" in said
    assert any(
        "image/png" in output.get("data", {})
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
