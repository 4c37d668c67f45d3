"""The notebooks: kept without outputs, short, complete, and they run. `make docs` shows what they give."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


FILES = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def cells(file: Path, kind: str) -> list[str]:
    book = json.loads(file.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]


def code(file: Path) -> str:
    return re.sub(r"(?m)^%.*$", "", "\n".join(cells(file, "code")))


def test_there_is_one_a_pillar_and_the_pages_lead_to_them():
    assert [file.stem for file in FILES] == ["less_data", "prompts", "smaller"]
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        assert all(f"examples/notebooks/{file.name})" in page.read_text(encoding="utf-8") for file in FILES)
    assert all(f"\nnotebooks/{file.stem}\n" in (ROOT / "docs" / "index.md").read_text("utf-8") for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_is_short_and_carries_no_outputs(file):
    book = json.loads(file.read_text(encoding="utf-8"))
    assert 5 <= len(book["cells"]) <= 8 and book["nbformat"] == 4
    for cell in book["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    assert cells(file, "markdown")[0].startswith("# ") and ast.parse(code(file)).body
    links = [link for text in cells(file, "markdown") for link in LINK.findall(text)]
    assert links and all((file.parent / link).is_file() for link in links)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_runs_offline_as_a_script_of_its_cells(file, tmp_path):
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-c", code(file)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"0\.\d{3}", done.stdout)
