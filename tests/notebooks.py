# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Runs notebooks from a clean kernel, as they are kept: ``python -m tests.notebooks`` for all of
them, or with their names, writes what they print and draw into them."""

import os
import sys
from pathlib import Path

import nbformat
import numpy as np  # noqa: F401  (so that its linear algebra is among the libraries)
import torch
from nbclient import NotebookClient
from threadpoolctl import threadpool_info

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def arithmetic() -> str:
    """The instructions that torch, and the linear algebra of numpy, use here. With others, sums are
    rounded otherwise, and chains and orders of components come out differently."""
    kinds = {str(x["architecture"]) for x in threadpool_info() if "architecture" in x}
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *sorted(kinds)])


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with what it prints and draws now, on one thread. The outputs of a cell are its
    whole standard output, then the rest; what goes to standard error is left out."""
    notebook = read(path)
    resources = {"metadata": {"path": str(FOLDER)}}
    where = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": where, "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources)
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = _tidied(cell.outputs)
    notebook.metadata["arithmetic"] = arithmetic()
    return notebook


def _tidied(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    rest = [o for o in outputs if o.output_type != "stream"]
    text = "".join(o.text for o in outputs if o.get("name") == "stdout")
    return [nbformat.v4.new_output("stream", text=text), *rest] if text else rest


def main(names: list[str]) -> None:
    for path in NOTEBOOKS:
        if not names or path.stem in names:
            notebook = run(path)
            nbformat.write(notebook, path)
            sys.stdout.write(f"{path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
