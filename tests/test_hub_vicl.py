"""Pools and visual in-context models on a Hub over HTTP: pushed by one process, run by others, also without us."""

import ast
import json

import pytest
from hub import LoopbackHub
from hub_scripts import MAKE, PUSH, WITH_US, WITHOUT_US


KINDS = ("embedded", "named", "cascade", "ranker", "painter")


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def pushed(hub, folder):
    """What pipelines of each kind answered in the process that pushed them."""
    code = MAKE + PUSH.format(cache=str(folder / "cache"), query=str(folder / "query.png"))
    return json.loads(hub.run(code, home=folder / "a").strip().splitlines()[-1])


def answers(hub, folder, script, home):
    code = "\n".join(script.format(repo=f"tester/{kind}", query=str(folder / "query.png")) for kind in KINDS)
    lines = hub.run(code, home=folder / home).strip().splitlines()[-len(KINDS) :]
    return dict(zip(KINDS, map(json.loads, lines), strict=True))


@pytest.fixture(scope="module")
def without_us(hub, folder, pushed):
    return answers(hub, folder, WITHOUT_US, "b")


@pytest.fixture(scope="module")
def with_us(hub, folder, pushed):
    return answers(hub, folder, WITH_US, "c")


def tree_of(hub, kind):
    tree = hub.repos["model", f"tester/{kind}"].head.tree
    return tree, json.loads(tree["config.json"]), tree["README.md"].decode()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_pushed_answers_the_same_anywhere(pushed, without_us, with_us, kind):
    for found in (without_us[kind], with_us[kind]):
        assert found[:3] == pushed[kind][:3] and found[3] == pytest.approx(pushed[kind][3], abs=1e-5)
    assert without_us[kind][4:7] == [2, 3, True]


def test_a_model_with_embedded_weights_names_its_pool_and_no_folder_of_ours(hub, pushed, without_us):
    tree, config, card = tree_of(hub, "embedded")
    head = hub.repos["dataset", "tester/embedded-pool"].head
    assert (config["pool"], config["pool_revision"]) == ("tester/embedded-pool", head.oid)
    assert config["strategy"] == "dense" and "tester/embedded-pool" in card
    assert "_name_or_path" not in config["frozen_model"]["backbone"]["config"]
    assert without_us["embedded"][7] == "tester/embedded-pool"


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_that_travels_imports_nothing_of_ours(hub, pushed, kind):
    tree, _, _ = tree_of(hub, kind)
    nodes = [node for name, text in tree.items() if name.endswith(".py") for node in ast.walk(ast.parse(text))]
    imported = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    imported += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert imported and not [module for module in imported if module.startswith("hf_effdl")]
    siblings = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level}
    assert {f"{name}.py" for name in siblings} <= tree.keys()


def test_backbones_with_a_repository_are_named_and_not_copied(hub, pushed):
    tree, config, _ = tree_of(hub, "named")
    vit, pool = hub.repos["model", "tester/vit"].head, hub.repos["dataset", "tester/scenes"].head
    assert config["frozen_model"]["backbone"] == {"id": "tester/vit", "revision": vit.oid}
    assert (config["pool"], config["pool_revision"]) == ("tester/scenes", pool.oid)
    assert len(tree["model.safetensors"]) < 1000 < len(vit.tree["model.safetensors"])
    frozen = tree_of(hub, "painter")[1]["frozen_model"]
    assert (frozen["kind"], frozen["backbone"]["id"]) == ("painter", "tester/weights")


@pytest.mark.parametrize("kind", ["cascade", "ranker"])
def test_a_kept_selector_is_the_default_and_the_card_says_so(hub, pushed, kind):
    tree, config, card = tree_of(hub, kind)
    assert config["strategy"] == config["selector"]["kind"] == kind
    assert "## How examples are chosen (the default)" in card
    assert {"cascade.py", "cascade_fit.py", "cascade_rows.py", "ranker_designs.py"} <= tree.keys()


def test_the_commit_that_was_loaded_is_the_one_that_is_named_and_folders_here_are_not(pushed):
    named = pushed["commits"]
    assert named["loaded"] == named["asked"] and named["encoder"] == named["asked"]["revision"]
    assert named["saved"] == named["encoder"] and named["newest"] != named["encoder"]
    assert named["folder"] == "vit" and named["pushed folder"] is None and named["same pool"]
