"""What is said of installing the package is true today: one line, and no promise that an index has the name."""

import re
import subprocess
import tomllib

import pytest
from conftest import ROOT

from hf_effdl.hub.cards import TEMPLATES
from hf_effdl.version import INSTALL
from hf_effdl.vicl.remote_code import pipeline_card


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# `pip install hf_effdl`, `uv add "hf_effdl[plot]"`, `pipx run hf-effdl`; not what goes on with `@ git+...`
PROMISE = re.compile(
    r"\b(?:pip|pipx|uvx?|conda|poetry)\s+(?:(?:pip|tool|install|add|run|-\S+)\s+)*"
    r"[\"'`]?hf[-_]effdl\b(?!\w)(?:\[[\w,\\\]]*\])?+(?!\s*@|/)",
    re.IGNORECASE,
)
BLOCK = '"hf_effdl['  # of a script's own requirements
OLD = ROOT / "tests" / "fixtures"  # as earlier versions wrote it


def texts():
    """Every file of text that is tracked, or beside them where git is not."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    files = [ROOT / name for name in names if name] or [file for file in ROOT.rglob("*") if file.is_file()]
    kinds = {".py", ".md", ".toml", ".yml", ".yaml", ".cff", ".ipynb", ".cfg", ".txt", ".html"}
    return [file for file in files if file.suffix in kinds and OLD not in file.parents and file.is_file()]


@pytest.mark.parametrize(
    "text, promises",
    [
        ("pip install hf_effdl", True),
        ('pip install -U "hf_effdl[plot]"', True),
        ("uv add hf-effdl", True),
        ("uvx hf-effdl", True),
        ("uv pip install hf_effdl[trl]", True),
        (INSTALL, False),
        ('pip install "hf_effdl[plot] @ git+https://github.com/hf-effdl/hf_effdl"', False),
        ("pip install .", False),
        ("pip install hf_effdl_other", False),
    ],
)
def test_a_promise_is_known_when_seen(text, promises):
    assert bool(PROMISE.search(text)) is promises


def test_no_file_promises_what_no_index_has():
    files = texts()
    assert len(files) > 300 and ROOT / "README.md" in files
    here = ROOT / "tests" / "test_installing.py"
    found = {file.name: PROMISE.findall(file.read_text()) for file in files if file != here}
    assert not {name: said for name, said in found.items() if said}


def test_scripts_that_ask_for_the_package_say_where_it_is():
    asking = [file for file in (ROOT / "examples").rglob("*.py") if BLOCK in file.read_text()]
    assert len(asking) > 20
    for file in asking:
        assert "# [tool.uv.sources]\n# hf_effdl = { path = " in file.read_text(), file.name


def test_the_line_names_the_repository_and_stands_in_every_place():
    assert INSTALL == f"pip install git+{PROJECT['urls']['Repository']}"
    assert pipeline_card.INSTALL == INSTALL  # its file travels and can import nothing of ours
    for file in ("README.md", "docs/installation.md"):
        assert f"    {INSTALL}\n" in (ROOT / file).read_text(), file
    cards = {file.name: file.read_text() for file in TEMPLATES.glob("*.md")}
    needing = {name for name, text in cards.items() if re.search(r"(?m)^(from|import) hf_effdl", text)}
    assert needing == {name for name, text in cards.items() if "# {{ install }}" in text} != set()


def test_every_extra_is_explained_and_errors_name_packages_in_its_range():
    page = (ROOT / "docs" / "installation.md").read_text()
    extras = PROJECT["optional-dependencies"]
    assert set(re.findall(r"`\.\[(\w+)\]`", page)) == set(extras)
    asked = {text for extra in ("plot", "faiss", "trl", "sam3", "ray") for text in extras[extra]}
    said = set()
    for file in (ROOT / "hf_effdl").rglob("*.py"):
        said |= set(re.findall(r'pip install "([\w\[\]-]+>=[^"]+)"', file.read_text()))
    assert said and said <= asked
