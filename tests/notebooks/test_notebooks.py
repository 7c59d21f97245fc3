"""Every notebook runs from top to bottom on a CPU, in the fast setting, with the code of this checkout."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/"

by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == ["01_sample", "02_edit", "03_train", "04_sharding"]


@by_name
def test_notebooks_are_valid_and_cleared(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    ids = [cell.id for cell in book.cells]
    assert len(set(ids)) == len(ids) and not any(name.isdigit() for name in ids)
    for cell in book.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None), cell.id


@by_name
def test_notebooks_open_on_colab_and_install_what_they_open(path):
    book = nbformat.read(path, as_version=4)
    first, install = book.cells[0].source, book.cells[1].source
    repository = first.split(COLAB)[1].split("/blob/main/")[0]
    assert f"{COLAB}{repository}/blob/main/notebooks/{path.name})" in first
    assert f"git+https://github.com/{repository}" in install and "find_spec" in install
    assert any("examine(" in cell.source for cell in book.cells[:6])


def test_one_command_names_another_repository():
    named = {path: set(re.findall(r"github(?:\.com)?/([\w.-]+/[\w.-]+)", path.read_text())) for path in NOTEBOOKS}
    (repository,) = set.union(*named.values())
    assert all(named.values()) and f"s#{repository}#OWNER/NAME#g" in (ROOT / "notebooks/README.md").read_text()


@pytest.mark.notebooks
@by_name
def test_notebooks_run(path, tmp_path):
    command = [sys.executable, str(ROOT / "tests/notebooks/execute.py"), path.stem, "--out", str(tmp_path)]
    environment = os.environ | {"UNCLIP_FAST": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = nbformat.read(tmp_path / path.name, as_version=4).cells
    ran = {cell.id: cell.outputs for cell in cells if cell.cell_type == "code"}
    assert not [output for outputs in ran.values() for output in outputs if output.output_type == "error"]
    shows = [cell.id for cell in cells if re.search(r"^(show|plt\.show|display)\(", cell.source, re.M)]
    assert len(shows) >= 3
    for name in shows:
        assert any("image/png" in output.get("data", {}) for output in ran[name]), name
    text = "".join(output.get("text", "") for output in ran["self-check"])
    assert "nothing is wrong" in text and f"in {ROOT / 'unclip_jax'}" in text
