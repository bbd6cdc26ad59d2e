"""The notebook of examples/: ``python -m tests.support.notebook`` runs it and stores what it shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tests.support import ROOT

NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"


def executed(folder: Path) -> Any:
    """The notebook after a run in a folder, on one thread; CellExecutionError where a cell raises."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    client = NotebookClient(book, timeout=300, kernel_name="python3", record_timing=False, resources={"metadata": {"path": folder}})
    return client.execute(env=environment)


def shown(cell: Any) -> tuple[str, list[Any]]:
    """What a cell printed, and its pictures. What libraries say of this machine on standard error is left out."""
    outputs = cell.get("outputs", [])
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    return printed, [output for output in outputs if output.output_type == "display_data"]


def store(book: Any) -> None:
    for cell in book.cells:
        if cell.cell_type == "code":
            printed, pictures = shown(cell)
            cell.outputs = [*([nbformat.v4.new_output("stream", text=printed)] if printed else []), *pictures]
    book.metadata = {name: book.metadata[name] for name in ("kernelspec",)}
    nbformat.write(book, NOTEBOOK)


if __name__ == "__main__":
    store(executed(NOTEBOOK.parent))
