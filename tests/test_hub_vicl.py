"""A pool and a visual in-context model on a Hub over HTTP: pushed by one process, run by others, also without us."""

import ast
import json

import pytest
from hub import LoopbackHub
from hub_scripts import MAKE, WITHOUT_US, last_line


WITH_US = """
import json
from PIL import Image
from hf_effdl import VisualInContextModel, VisualInContextPipeline
from transformers import AutoModel
pipe = VisualInContextPipeline(model={repo!r})
out = pipe(Image.open({query!r}))
model = VisualInContextModel.from_pretrained({repo!r})
auto = AutoModel.from_pretrained({repo!r})  # no trust_remote_code: the class is registered
assert type(auto) is type(model)
print(json.dumps([out["prediction"].tolist(), str(out["prediction"].dtype), out["example_ids"], out["scores"]]))
"""


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        yield server


def test_a_model_with_embedded_weights_runs_anywhere(hub, tmp_path):
    query = str(tmp_path / "query.png")
    pushed = hub.run(
        MAKE
        + f"""
encoder = VisionEncoder(tiny())
pool = ExamplePool.from_dataset(dataset, label_column="mask", encoder=encoder, id_column="name",
                                cache_dir={str(tmp_path / "cache")!r}, progress=False)
pipe = VisualInContextPipeline(VisualInContextModel.from_parts(FeatureMatching(encoder)), "dense", pool)
query.save({query!r})
pipe.push_to_hub("tester/icl")
print(json.dumps(plain(pipe(query))))
""",
        home=tmp_path / "a",
    )
    expected = last_line(pushed)
    tree = hub.repos["model", "tester/icl"].head.tree
    config = json.loads(tree["config.json"])
    assert (
        config["pool"] == "tester/icl-pool"
        and config["pool_revision"] == hub.repos["dataset", "tester/icl-pool"].head.oid
    )
    assert config["strategy"] == "dense"
    assert "_name_or_path" not in config["frozen_model"]["backbone"]["config"]
    nodes = [node for name, text in tree.items() if name.endswith(".py") for node in ast.walk(ast.parse(text))]
    imported = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    imported += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert imported and not [module for module in imported if module.startswith("hf_effdl")]
    assert "tester/icl-pool" in tree["README.md"].decode()
    found = last_line(hub.run(WITHOUT_US.format(repo="tester/icl", query=query), home=tmp_path / "b"))
    assert found[:3] == expected[:3] and found[3] == pytest.approx(expected[3], abs=1e-6)
    assert found[4:] == [2, 3, True, "tester/icl-pool"]
    found = last_line(hub.run(WITH_US.format(repo="tester/icl", query=query), home=tmp_path / "c"))
    assert found[:3] == expected[:3] and found[3] == pytest.approx(expected[3], abs=1e-6)


def test_the_commit_that_was_loaded_is_the_one_that_is_named_and_folders_here_are_not(hub, tmp_path):
    hub.run(
        MAKE
        + f"""
from transformers import SegGptConfig, SegGptForImageSegmentation
sizes = {{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "decoder_hidden_size": 4}}
shape = {{"image_size": (64, 32), "patch_size": 8, "pretrain_image_size": 32, "merge_index": 0}}
config = SegGptConfig(**sizes, **shape, intermediate_hidden_state_indices=[0, 1])
from huggingface_hub import HfApi
commits = []
for _ in range(2):  # two sets of weights
    SegGptForImageSegmentation(config).push_to_hub("tester/seggpt")
    commits.insert(0, HfApi().model_info("tester/seggpt").sha)
model = VisualInContextModel.from_backbone("tester/seggpt", revision=commits[1])
assert model.config.frozen_model["backbone"] == {{"id": "tester/seggpt", "revision": commits[1]}}
assert model.encoder.describe()["revision"] == commits[1]
model.save_pretrained("saved")
again = VisualInContextModel.from_pretrained("saved")
assert again.encoder.fingerprint == model.encoder.fingerprint and again.frozen.revision == commits[1]
assert VisualInContextModel.from_backbone("tester/seggpt").frozen.revision == commits[0]

tiny().save_pretrained("vit")
pool = ExamplePool.from_dataset(dataset, label_column="mask", encoder="vit", cache_dir={str(tmp_path / "cache")!r},
                                progress=False)
assert pool.encoder["id"] == "vit"
pool.push_to_hub("tester/local")
again = ExamplePool.from_pretrained("tester/local")
assert again.encoder["id"] is None and again.fingerprint == pool.fingerprint
""",
        home=tmp_path / "a",
    )


def test_backbones_with_a_repository_are_named_and_not_copied(hub, tmp_path):
    query = str(tmp_path / "query.png")
    pushed = hub.run(
        MAKE
        + f"""
tiny().push_to_hub("tester/vit")
encoder = VisionEncoder.from_pretrained("tester/vit")
pool = ExamplePool.from_dataset(dataset, label_column="mask", encoder="tester/vit", id_column="name",
                                cache_dir={str(tmp_path / "cache")!r}, progress=False)
pool.push_to_hub("tester/scenes")
pipe = VisualInContextPipeline("tester/vit", pool="tester/scenes")
query.save({query!r})
pipe.push_to_hub("tester/named")
print(json.dumps(plain(pipe(query))))
""",
        home=tmp_path / "a",
    )
    expected = last_line(pushed)
    tree = hub.repos["model", "tester/named"].head.tree
    config = json.loads(tree["config.json"])
    vit = hub.repos["model", "tester/vit"].head
    assert config["frozen_model"]["backbone"] == {"id": "tester/vit", "revision": vit.oid}
    assert (
        config["pool"] == "tester/scenes" and config["pool_revision"] == hub.repos["dataset", "tester/scenes"].head.oid
    )
    assert len(tree["model.safetensors"]) < 1000 < len(vit.tree["model.safetensors"])
    found = last_line(hub.run(WITHOUT_US.format(repo="tester/named", query=query), home=tmp_path / "b"))
    assert found[:3] == expected[:3]
