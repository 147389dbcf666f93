"""The notebook runs from top to bottom in a kernel of its own."""

import ast

import pytest

from tests.support.launch import ROOT

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
FILE = ROOT / "examples" / "pruning.ipynb"


def test_the_notebook_is_stored_without_outputs():
    book = nbformat.read(FILE, as_version=4)
    assert not [cell for cell in book.cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.slow
def test_the_notebook_runs_and_meets_its_target(monkeypatch, tmp_path):
    monkeypatch.delenv("DIST_PRUNE_DATA", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    book = nbformat.read(FILE, as_version=4)
    book.cells.append(nbformat.v4.new_code_cell("print(result)"))
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(FILE.parent)}}).execute()
    (printed,) = book.cells.pop().outputs
    result = ast.literal_eval(printed.text)
    assert 0.45 < result["macs"] <= 0.5
    assert result["params"] < 1
    assert result["recalibrated"] > result["pruned"]
    assert result["finetuned"] > 90
    assert result["loaded"] == result["finetuned"]
    assert [
        output for cell in book.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
