"""Code for processes of their own that meet on a Hub: one makes a pool of scenes, one runs what was pushed."""

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
import json, torch
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
# after MAKE: pipelines of five kinds, what each answers, and what is said of commits and folders
PUSH = """
import warnings
from huggingface_hub import HfApi
from transformers import SegGptConfig, SegGptForImageSegmentation
from hf_effdl import CascadeSelector, ListwiseRanker, ListwiseRankerConfig, measure_examples
from hf_effdl.vicl.remote_code import cascade_head
from hf_effdl.vicl.remote_code.ranker_selector import RankerSelector

torch.set_num_threads(1)
query.save({query!r})
found = dict()

def pushed(pipe, kind):
    pipe.push_to_hub("tester/" + kind)
    found[kind] = plain(pipe(query))

def pool_of(encoder):
    return ExamplePool.from_dataset(dataset, label_column="mask", encoder=encoder, id_column="name",
                                    cache_dir={cache!r}, progress=False)

encoder = VisionEncoder(tiny())
pushed(VisualInContextPipeline(VisualInContextModel.from_parts(FeatureMatching(encoder)), "dense", pool_of(encoder)),
       "embedded")

tiny().push_to_hub("tester/vit")
pool_of("tester/vit").push_to_hub("tester/scenes")
pushed(VisualInContextPipeline("tester/vit", pool="tester/scenes"), "named")

model, pool = VisualInContextModel.from_parts(FeatureMatching(encoder, temperature=0.003)), pool_of(encoder)
measure_examples(model, pool, candidates=8, progress=False)
cascade_head.STEPS = 3
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    cascade = CascadeSelector(model, passes=3, head="listwise").fit(pool, progress=False)
pushed(VisualInContextPipeline(model, cascade, pool), "cascade")
ranker = ListwiseRanker(ListwiseRankerConfig(hidden_size=16, num_attention_heads=2, list_length=3)).eval()
pushed(VisualInContextPipeline(model, RankerSelector(ranker, reliable=torch.arange(0, 12, 2)), pool), "ranker")

sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, decoder_hidden_size=4)
shape = dict(image_size=(64, 32), patch_size=8, pretrain_image_size=32, merge_index=0)
shape |= dict(intermediate_hidden_state_indices=[0, 1])
SegGptForImageSegmentation(SegGptConfig(**sizes, **shape, in_context_model="painter")).push_to_hub("tester/weights")
pushed(VisualInContextPipeline("tester/weights", pool="tester/scenes"), "painter")

config = SegGptConfig(**sizes, **shape)
commits = []
for _ in range(2):  # two sets of weights
    SegGptForImageSegmentation(config).push_to_hub("tester/seggpt")
    commits.insert(0, HfApi().model_info("tester/seggpt").sha)
model = VisualInContextModel.from_backbone("tester/seggpt", revision=commits[1])
model.save_pretrained("saved")
again = VisualInContextModel.from_pretrained("saved")
assert again.encoder.fingerprint == model.encoder.fingerprint
newest = VisualInContextModel.from_backbone("tester/seggpt").frozen.revision
assert newest == commits[0]
tiny().save_pretrained("vit")
pool = pool_of("vit")
pool.push_to_hub("tester/local")
other = ExamplePool.from_pretrained("tester/local")
found["commits"] = {{
    "asked": {{"id": "tester/seggpt", "revision": commits[1]}},
    "loaded": model.config.frozen_model["backbone"],
    "encoder": model.encoder.describe()["revision"],
    "saved": again.frozen.revision,
    "newest": newest,
    "folder": pool.encoder["id"],
    "pushed folder": other.encoder["id"],
    "same pool": other.fingerprint == pool.fingerprint,
}}
print(json.dumps(found))
"""
