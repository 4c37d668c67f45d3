"""A pool and a visual in-context model on a Hub over HTTP: pushed by one process, run by others, also without us."""

import json

import pytest
from hub import LoopbackHub


MAKE = """
import json, sys
import numpy as np, torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from transformers import AutoModel, ViTConfig, ViTModel
from hf_effdl import ExamplePool, FeatureMatching, VisionEncoder, VisualInContextModel, VisualInContextPipeline

torch.manual_seed(0)

def scene(i):
    rng = np.random.default_rng(i)
    image = rng.integers(0, 80, (40, 48, 3), dtype=np.uint8)
    x, y = rng.integers(0, 28), rng.integers(0, 20)
    image[y : y + 20, x : x + 20] += np.array([150, 20, 20], dtype=np.uint8)
    mask = np.zeros((40, 48), np.uint8)
    mask[y : y + 20, x : x + 20] = 1
    return Picture.fromarray(image), Picture.fromarray(mask)

pairs = [scene(i) for i in range(12)]
features = Features({"image": Image(), "mask": Image(), "name": Value("string")})
rows = {"image": [a for a, _ in pairs], "mask": [b for _, b in pairs], "name": [f"scene {i}" for i in range(12)]}
dataset = Dataset.from_dict(rows, features=features)
query = scene(99)[0]

def tiny():
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
                       patch_size=8)
    return ViTModel(config, add_pooling_layer=False)

def plain(out):
    prediction = out["prediction"]
    return [prediction.tolist(), str(prediction.dtype), out["example_ids"], out["scores"]]
"""
WITHOUT_US = """
import json, sys
sys.modules["hf_effdl"] = None  # importing it raises
from PIL import Image
from transformers import pipeline
pipe = pipeline(model={repo!r}, trust_remote_code=True)
query = Image.open({query!r})
out = pipe(query)
batch = pipe([query, query], num_examples=3)
print(json.dumps([out["prediction"].tolist(), str(out["prediction"].dtype), out["example_ids"], out["scores"],
                  len(batch), len(batch[1]["example_ids"]), pipe.plot(query).size[1] > 0, pipe.model.config.pool]))
"""
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


def last_line(output: str) -> list:
    return json.loads(output.strip().splitlines()[-1])


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
    assert b"hf_effdl" not in b"".join(
        line
        for name, text in tree.items()
        if name.endswith(".py")
        for line in text.splitlines()
        if line.startswith((b"import", b"from"))
    )
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
