"""The notebook runs, cell by cell, in a kernel as Jupyter has it."""

import ast
import os
import re
from pathlib import Path

import pytest


nbclient = pytest.importorskip("nbclient")
import nbformat  # noqa: E402, comes with nbclient


ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "iekd_in_15_minutes.ipynb"


@pytest.mark.slow
def test_the_notebook_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel has its own
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()

    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = "\n".join(output.get("text", "") for cell in cells for output in cell.outputs)
    accuracy = dict(re.findall(r"^(\S.*\S) +([\d.]+)%$", printed, flags=re.MULTILINE))
    assert list(accuracy) == ["teacher", "plain student", "distilled student"]
    accuracy = {name: float(value) for name, value in accuracy.items()}
    assert accuracy["teacher"] > 95 and accuracy["distilled student"] > accuracy["plain student"] + 2, accuracy
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    # Trainer's table of a notebook has what was measured while each network learnt.
    tables = "".join(output.get("data", {}).get("text/html", "") for cell in cells for output in cell.outputs)
    assert "Validation Loss" in tables and "Accuracy" in tables
    (result,) = (output for output in cells[-1].outputs if output.output_type == "execute_result")
    label, scores = ast.literal_eval(re.sub(r"np\.int64\((\d+)\)", r"\1", result["data"]["text/plain"]))
    assert len(scores) == 3 and {score["label"] for score in scores} <= set("0123456789") and label in range(10)
    assert (tmp_path / "notebook" / "student" / "model.safetensors").is_file()
    assert (tmp_path / "notebook" / "student" / "_paraphraser" / "model.safetensors").is_file()


def test_the_notebook_is_kept_with_its_outputs():
    """Of one run from top to bottom, without warnings, progress bars and paths of the machine that ran it."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    gained = re.search(r"^Distillation: \+([\d.]+) points", "".join(o.get("text", "") for o in outputs), re.MULTILINE)
    assert gained and float(gained[1]) > 2
    for link in re.findall(r"\]\((\.\./[^)#]+)", "".join(cell.source for cell in notebook.cells)):
        assert (NOTEBOOK.parent / link).is_file(), link
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    texts = [output.get("text", "") for output in outputs]
    texts += [text for output in outputs for kind, text in output.get("data", {}).items() if kind != "image/png"]
    assert not re.search(r"site-packages|/(home|Users|root|tmp|opt|usr)/", "".join(texts))
