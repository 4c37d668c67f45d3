"""Every kind of artefact over HTTP: pushed past faults, loaded in fresh processes, pinned, refused, and offline.

What is on the main branches when things are loaded would raise where it is read: only the pinned commits are whole.
"""

import json
import re
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import hub_matrix
import pytest
from hub import LoopbackHub
from huggingface_hub.errors import LocalEntryNotFoundError

from hf_effdl import ExamplePool, VisualInContextPipeline, choose
from hf_effdl.version import INSTALL


METRIC = "foreground_iou"
ARTEFACTS = list(hub_matrix.LOADERS)
# what needs the package, and what is said without it
NEEDS_US = {"free": "Unknown quantization type, got hf_effdl", "ticket": "import of hf_effdl halted"}
PUSH_FAULTS = [("forbidden", ""), ("private", ""), ("missing", ""), ("broken", "commit"), ("cut", "commit")]
LOAD_FAULTS = [("gated", ""), ("private", ""), ("missing", ""), ("broken", ""), ("cut", ""), ("silent", "resolve")]
PATIENCE = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}  # seconds
# each in the words of the client, of transformers or of datasets, none of them in ours
SAID = {
    "forbidden": "403 Forbidden",
    "gated": "gated",
    "private": "401|private|cannot be accessed",
    "missing": "404|not a valid model identifier|doesn't exist on the Hub",
    "broken": "500|couldn't connect|locate the file on the Hub",
    "cut": "disconnected|Can't load the configuration",
    "silent": "timed out|couldn't connect|locate the file on the Hub|Can't load the configuration|Couldn't reach",
}
# plain errors of Python's with their own words, around the client's error
OF_DATASETS = {
    "builtins.FileNotFoundError": "^Couldn.t find any data file .* on the Hugging Face Hub either: LocalEntryNotFound",
    "builtins.ConnectionError": r"^Couldn't reach '.*' on the Hub \(LocalEntryNotFoundError\)$",
}
UPSTREAM = {"huggingface_hub", "httpx", "httpx2", "datasets"}


def spoil(repo):
    for branch in list(repo.branches):
        names = [name for name in repo.resolve(branch).tree if name != ".gitattributes"]
        repo.commit(
            dict.fromkeys(names, b"raise SystemError('this is not the commit that was asked for')"), branch=branch
        )


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A hub with every artefact, the commit of each, what it answered where it was made, and what pushes met."""
    home = tmp_path_factory.mktemp("hub")
    expected, told = {METRIC: [0.5, 0.5]}, {}
    with LoopbackHub() as hub:
        for pillar in hub_matrix.PILLARS:
            code = f"import hub_matrix; hub_matrix.push({pillar!r}, {PUSH_FAULTS})"
            hub.run(code, home / pillar, timeout=600)
            expected |= json.loads((home / pillar / "expected.json").read_text())
            told |= json.loads((home / pillar / "told.json").read_text())
        code = (files("hf_effdl.metrics") / METRIC / f"{METRIC}.py").read_bytes()
        hub.add(f"tester/{METRIC}", {f"{METRIC}.py": code}, "space")
        repos = {repo_id.partition("/")[2]: repo for (_, repo_id), repo in hub.repos.items()}
        revisions = {name: repos[name].head.oid for name in ARTEFACTS}
        cards = {name: repo.head.tree["README.md"].decode() for name, repo in repos.items() if name != METRIC}
        record = json.loads(repos["family"].head.tree["family.json"])
        facts = {"FAMILY_MACS": json.dumps(record["members"][1]["macs"]), "QUERY": str(home / "prompts" / "query.png")}
        facts["FAMILY_COMMIT"] = repos["family"].branches["macs-0.4"]
        for name in ARTEFACTS:
            spoil(repos[name])

        def load(where, ours=True, faults=(), **env):
            names = {name: at for name, at in revisions.items() if not (faults and name == METRIC)}
            code = f"import os; os.environ.update({facts | env}); import hub_matrix; "
            out = hub.run(code + f"hub_matrix.load({names}, {ours}, {list(faults)})", home / where, timeout=600)
            return json.loads(out.strip().splitlines()[-1])

        yield SimpleNamespace(hub=hub, expected=expected, told=told, cards=cards, load=load)


@pytest.fixture(scope="module")
def with_us(pushed):
    return pushed.load("with")


@pytest.fixture(scope="module")
def without_us(pushed):
    return pushed.load("without", ours=False)


@pytest.fixture(scope="module")
def past_faults(pushed):
    return pushed.load("faults", faults=LOAD_FAULTS, **PATIENCE)


@pytest.fixture(scope="module")
def offline(pushed, with_us):
    before = len(pushed.hub.log)
    return pushed.load("with", HF_HUB_OFFLINE="1"), pushed.hub.log[before:]


def answers(found, pushed, name):
    assert found[name]["error"] is None, found[name]["error"]
    assert found[name]["answer"] == pytest.approx(pushed.expected[name], abs=1e-5) if name == "ranker" else True
    return name == "ranker" or found[name]["answer"] == pushed.expected[name]


def upstreams_own(error, fault):
    """Whether an error is the client's or upstream's own, and says what has happened."""
    *kinds, text = error
    own = {kind.partition(".")[0] for kind in kinds} & UPSTREAM or kinds[0] == "builtins.OSError"
    if fault in ("broken", "silent") and kinds[0] in OF_DATASETS:
        own = re.search(OF_DATASETS[kinds[0]], text)
    return own and re.search(SAID[fault], text) and "holds no" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ARTEFACTS)
def test_the_pinned_commit_gives_the_answer_in_a_fresh_process(pushed, with_us, name):
    assert answers(with_us, pushed, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARTEFACTS)
def test_what_does_not_need_the_package_loads_without_and_what_does_says_so(pushed, without_us, name):
    found = without_us[name]
    if name not in NEEDS_US:
        assert answers(without_us, pushed, name)
        return
    assert found["error"] and not found["answer"]
    assert NEEDS_US[name] in " ".join([found["error"][-1], *found["logged"]])
    assert pushed.cards[name].index(f"# {INSTALL}") < pushed.cards[name].index("from_pretrained(")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARTEFACTS)
def test_what_was_loaded_once_loads_offline_without_a_request(pushed, offline, name):
    found, requests = offline
    assert answers(found, pushed, name)
    assert not [request for request in requests if METRIC not in request]  # evaluate asks all the same


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARTEFACTS if name != METRIC])
def test_a_push_that_failed_says_why_in_upstreams_words_and_loses_nothing(pushed, name):
    *errors, vanished = pushed.told[name]
    assert vanished == []
    for (fault, _), error in zip(PUSH_FAULTS, errors, strict=True):
        assert error and upstreams_own(error, fault), error


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARTEFACTS if name != METRIC])
def test_a_load_that_failed_says_why_in_upstreams_words_and_can_be_repeated(pushed, past_faults, name):
    for (fault, _), error in zip(LOAD_FAULTS, past_faults[name]["told"], strict=True):
        assert error and upstreams_own(error, fault), error
    assert answers(past_faults, pushed, name)


LOADS = """
import json, time
import hub_matrix
from hf_effdl import ExamplePool, Ticket
from hf_effdl.samples.selection.files import load
from huggingface_hub.errors import LocalEntryNotFoundError

def loaded(name):
    loads = {"ticket": Ticket.from_pretrained, "pool": ExamplePool.from_pretrained, "selection": load}
    return loads[name]("tester/" + name)

hub_matrix.short_of_patience()
for silent, raises in (("", True), ("api", False), ("", False)):  # the last time all is in the cache
    hub_matrix.fault("silent", silent)
    for name in ("ticket", "pool", "selection"):
        try:
            loaded(name)
            assert not raises, name
        except LocalEntryNotFoundError:
            assert raises, name
"""


@pytest.mark.slow
def test_a_hub_that_falls_silent_keeps_no_load_waiting_longer_than_the_client_is_told_to(tmp_path):
    """The client itself waits without end for an answer of the Hub's API, which is not asked."""
    fixtures = Path(__file__).parent / "fixtures"
    with LoopbackHub() as hub:
        for name, kind in (("ticket", "model"), ("pool", "dataset"), ("selection", "dataset")):
            folder = fixtures / name / "saved"
            found = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
            hub.add(f"tester/{name}", {place: file.read_bytes() for place, file in found.items()}, kind)
        hub.run(f"import os; os.environ.update({PATIENCE})\n{LOADS}", tmp_path, timeout=300)
    asked = {line.split()[1] for line in hub.log}
    assert asked and not [path for path in asked if path.startswith("/api/")]


@pytest.mark.parametrize(
    "load", [lambda repo: choose(repo, macs=1), ExamplePool.from_pretrained], ids=["family", "pool"]
)
def test_a_hub_that_does_not_answer_is_not_taken_for_an_empty_repository(load):
    with pytest.raises(LocalEntryNotFoundError):  # the tests are offline
        load("tester/there")


def test_a_revision_is_of_a_repository():
    with pytest.raises(ValueError, match="revision='abc' is of a repository, and model= is a SimpleNamespace"):
        VisualInContextPipeline(SimpleNamespace(), revision="abc")
