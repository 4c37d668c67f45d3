"""Calls that work today work in the next version: names and arguments are as they were recorded, or more."""

import interface
import pytest
from conftest import ROOT

import hf_effdl


def f(a, b=1, *, c, d=2):
    pass


def more(a, b=1, e=0, *, c, d=2, g=None):
    pass


def loose(a, b=1, **kwargs):
    pass


BROKEN = {
    "f is gone": None,
    "f: b= is gone": lambda a, *, c, d=2: None,
    "f: d= is gone": lambda a, b=1, *, c: None,
    "f: a= is gone": lambda x, b=1, *, c, d=2: None,
    "f: b= has no default any more": lambda a, b, *, c, d=2: None,
    "f: e= is new and has no default": lambda a, b=1, *, c, e, d=2: None,
    "f: arguments by place are others": lambda b=1, a=1, *, c, d=2: None,
}


# each with the junk that it refuses after the warning
DEPRECATED = {"CascadeSelector.fit(pool, labels=...)": lambda: hf_effdl.CascadeSelector().fit(None, labels=object())}


@pytest.mark.parametrize("said", BROKEN)
def test_a_change_that_breaks_calls_is_told(said):
    now = {} if BROKEN[said] is None else {"f": interface.arguments(BROKEN[said])}
    assert said in interface.breaks({"f": interface.arguments(f)}, now)


@pytest.mark.parametrize("other", [f, more, loose, lambda a, b=1, c=3, d=2: None])
def test_a_change_that_breaks_none_is_not(other):
    assert interface.breaks({"f": interface.arguments(f)}, {"f": interface.arguments(other), "g": []}) == []


def test_nothing_public_has_gone_and_all_of_it_is_recorded():
    recorded, found = interface.read(), interface.interface(hf_effdl)
    assert len(recorded) > 200 and {"SplitLBITrainer.slim", "slim", "uncertainty"} < set(recorded)
    assert interface.breaks(recorded, found) == [], "see the policy in docs/migration.md"
    assert recorded == found, "new: python tests/support/interface.py"


def test_what_is_deprecated_still_works_warns_and_is_in_the_table():
    page = (ROOT / "docs" / "migration.md").read_text()
    files = (
        file for file in (ROOT / "hf_effdl").rglob("*.py") if file.stem != "moved"
    )  # old paths, one warning for all
    sources = "".join(file.read_text() for file in files)
    assert sources.count("FutureWarning") == len(DEPRECATED)
    for said, call in DEPRECATED.items():
        assert f"`{said}`" in page, said
        with pytest.warns(FutureWarning, match="is called measured= now") as warned, pytest.raises(ValueError):
            call()
        assert len(warned) == 1
