"""What is released: a source distribution that can test itself, and a wheel that works where the clone is not."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT


pytestmark = pytest.mark.slow
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(*command, **options):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # which may lead to the clone
    command = [str(part) for part in command]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The unpacked source distribution, built from the tracked files alone."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("sdist")
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    name = run(sys.executable, "-c", BUILD, "build_sdist", out, cwd=clone).split()[-1]
    with tarfile.open(out / name) as archive:
        archive.extractall(out, filter="data")
    (out / name).unlink()
    return next(out.iterdir())


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory):
    """The Python of an empty environment with the wheel alone; what it depends on is lent by this one."""
    out, home = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("env")
    wheel = out / run(sys.executable, "-c", BUILD, "build_wheel", out, cwd=source).split()[-1]
    run(sys.executable, "-m", "venv", "--without-pip", home)
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    places = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # a path file inside that folder, such as that of this clone, is not followed
    (places / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_source_distribution_holds_all_that_is_tracked(source):
    tracked = {name for name in run("git", "ls-files", cwd=ROOT).splitlines() if not name.startswith(".")}
    there = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()}
    assert len(tracked) > 400 and tracked - there == set()
    assert {name for name in there - tracked if "egg-info" not in name} <= {"PKG-INFO", "setup.cfg"}


def test_its_tests_find_their_helpers_and_pass(source):
    collected = run(sys.executable, "-m", "pytest", "tests", "--collect-only", "-p", "no:cacheprovider", cwd=source)
    assert int(re.search(r"(\d+)(?:/\d+)? tests collected", collected)[1]) > 2000
    few = ["tests/test_designs.py", "tests/test_installing.py"]
    assert "failed" not in run(sys.executable, "-m", "pytest", *few, "-q", "-p", "no:cacheprovider", cwd=source)


def test_the_wheel_is_all_there_is_and_says_what_it_is(installed, tmp_path):
    code = (
        "import hf_effdl; from importlib.metadata import metadata, requires; from pathlib import Path\n"
        "print(Path(hf_effdl.__file__).parent, metadata('hf_effdl')['Version'], hf_effdl.__version__)\n"
        "[getattr(hf_effdl, name) for name in hf_effdl.__all__]\n"
        "print(len(requires('hf_effdl')), metadata('hf_effdl').get_payload().count('](docs/'))"
    )
    place, version, own, needs, relative = run(installed, "-I", "-c", code, cwd=tmp_path).split()
    assert Path(place).is_relative_to(Path(installed).parents[1]) and version == own
    assert int(needs) > len(PROJECT["dependencies"]) and relative == "0"
    there = {file.relative_to(place) for file in Path(place).rglob("*") if "__pycache__" not in file.parts}
    ours = {file.relative_to(ROOT / "hf_effdl") for file in (ROOT / "hf_effdl").rglob("*")}
    assert {file for file in ours if "__pycache__" not in file.parts} == there


def test_the_first_blocks_of_the_readme_run_on_the_wheel(installed, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for block in blocks[:2]:  # the third wants the Hub
        printed = run(installed, "-I", "-c", block, cwd=tmp_path)
    assert "suspect" in printed or "label" in printed
    assert (tmp_path / "runs" / "digits-half" / "model.safetensors").is_file()


def test_console_scripts_answer(installed, tmp_path):
    for name in PROJECT.get("scripts", {}):
        assert "usage" in run(installed.parent / name, "--help", cwd=tmp_path).lower()
