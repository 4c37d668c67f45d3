"""Sphinx settings: MyST pages, a reference made from the docstrings, links to the repository for what is no page."""

import re
import sys
import tomllib
from pathlib import Path

import hf_effdl


sys.path.insert(0, str(Path(__file__).parent))

from docstrings import rendered  # noqa: E402


ROOT = Path(__file__).parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
OUTSIDE = re.compile(r"(?<!!)(\[[^\]]*\])\((?:\.\./)+((?:examples|model_cards|tests|hf_effdl)[^)#]*)\)")

project = "hf_effdl"
author = "The hf_effdl authors"
copyright = author
version = release = hf_effdl.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx_copybutton"]
templates_path = ["_templates"]
exclude_patterns = ["_build", "benchmarks/tables", "notebooks/runs"]
myst_heading_anchors = 3
default_role = "code"  # docstrings mark names with single backticks
autosummary_generate = True
nb_execution_mode = "force"  # the notebooks are kept without outputs
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "remove"  # progress bars
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature says them
autodoc_default_options = {"members": True, "inherited-members": False}
napoleon_use_rtype = False
nitpicky = False

html_theme = "furo"
html_title = f"hf_effdl {release}"
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}


def copy_notebooks(app):
    """Sphinx reads nothing outside docs/."""
    folder = Path(app.srcdir) / "notebooks"
    folder.mkdir(exist_ok=True)
    for file in (ROOT / "examples" / "notebooks").glob("*.ipynb"):
        text = file.read_text(encoding="utf-8").replace("](../../docs/", "](../")
        (folder / file.name).write_text(text, encoding="utf-8")


def link_to_repository(app, docname, source):
    """Links that leave docs/ go to the repository's files."""
    source[0] = OUTSIDE.sub(rf"\1({REPOSITORY}/blob/main/\2)", source[0])


def render_docstring(app, what, name, obj, options, lines):
    lines[:] = rendered(lines)


def setup(app):
    app.connect("builder-inited", copy_notebooks, priority=100)  # before Sphinx looks for pages
    app.connect("source-read", link_to_repository)
    app.connect("autodoc-process-docstring", render_docstring, priority=400)  # before napoleon reads the sections
