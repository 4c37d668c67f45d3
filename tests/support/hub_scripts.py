"""Code for processes of their own that meet on a Hub: one makes a pool of scenes, one runs what was pushed."""

import json


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


def last_line(output: str) -> list:
    return json.loads(output.strip().splitlines()[-1])
