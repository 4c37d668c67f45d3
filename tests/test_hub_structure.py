"""A run and the slim models taken from it, pushed to a Hub over HTTP and loaded back in fresh processes."""

from pathlib import Path

import pytest
from hub import LoopbackHub

from hf_effdl.version import INSTALL


TESTS = Path(__file__).parent / "support"


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("push")
    code = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
import tiny_run, torch
torch.set_num_threads(1)
run = tiny_run.trainer("run", num_train_epochs=2, push_to_hub=True, hub_model_id="tester/dense", save_strategy="no")
run.train()
run.evaluate_path(shares=(0.7, 0.4))
x = torch.linspace(-1, 1, 512).view(2, 1, 16, 16)
outputs = {{"dense": run.model.eval()(x).logits}}
small = run.slim(macs=0.6, bn_batches=4)
run.results = {{
    "dense, split LBI": {{"accuracy": 0.5, "params": 1, "macs": 2, "latency_ms": 3.0}},
    "slim": {{"accuracy": 0.25, "params": small.config.effdl_report["params"]["after"], "macs": 1, "latency_ms": 2.0}},
}}
run.push_to_hub(dataset="made-up patches", tasks="image-classification")
run.push_slim(small, "tester/slim", dataset="made-up patches", tasks="image-classification")
outputs["slim"] = small.eval()(x).logits
free = run.slim(macs=0.6, widths="free")
run.push_slim(free, "tester/free")
outputs["free"] = free.eval()(x).logits
torch.save({{name: value.detach() for name, value in outputs.items()}}, "outputs.pt")
"""
    hub.run(code, home)
    return home


LOAD = """
import torch
from transformers import AutoModelForImageClassification
x = torch.linspace(-1, 1, 512).view(2, 1, 16, 16)
model = AutoModelForImageClassification.from_pretrained("tester/{name}").eval()
expected = torch.load({outputs!r}, weights_only=True)["{name}"]
print(torch.equal(model(x).logits, expected), model.config.hidden_sizes)
"""
BLOCKED = "import sys; sys.modules['hf_effdl'] = None\n"


@pytest.mark.parametrize("name", ["dense", "slim"])
def test_a_stock_model_loads_from_the_hub_where_the_package_cannot_be_imported(hub, pushed, tmp_path, name):
    out = hub.run(BLOCKED + LOAD.format(name=name, outputs=str(pushed / "outputs.pt")), tmp_path)
    assert out.startswith("True")


def test_free_widths_load_from_the_hub_after_the_import_and_fail_loudly_without(hub, pushed, tmp_path):
    load = LOAD.format(name="free", outputs=str(pushed / "outputs.pt"))
    assert hub.run("import hf_effdl\n" + load, tmp_path / "a").startswith("True")
    with pytest.raises(AssertionError, match="size mismatch|mismatched|shape"):
        hub.run(BLOCKED + load, tmp_path / "b")


def test_the_path_loads_from_the_hub_without_the_model_and_selects(hub, pushed, tmp_path):
    code = """
from huggingface_hub import snapshot_download
from hf_effdl import SparsePath
path = SparsePath.load(snapshot_download("tester/dense"))
print(path.step, len(path.curve), sorted(path.select(macs=0.6)) == sorted(path.units))
"""
    assert hub.run(code, tmp_path).split() == ["16", "2", "True"]


def test_the_cards_hold_what_a_reader_needs(hub, pushed):
    def files(name):
        return hub.repos["model", f"tester/{name}"].head.tree

    card = files("slim")["README.md"].decode()
    kinds = ("image-classification", "made-up patches", "split-lbi", "transformers alone loads it")
    rows = ("| dense, split LBI | 0.5 | 1 | 2 | 3 |", "| path_scale |", "| nu | 5", "MACs", "latency")
    parts = ("## Recipe", "## Limits", "@inproceedings", "![When each unit entered the support](sparse_path.png)")
    for text in (*kinds, *rows, *parts, 'from_pretrained("tester/slim")'):
        assert text in card, text
    assert "import hf_effdl" not in card
    assert files("slim")["sparse_path.png"].startswith(b"\x89PNG") and "sparse_path.safetensors" in files("slim")
    free = files("free")["README.md"].decode()
    assert free.index(f"# {INSTALL}\nimport hf_effdl") < free.index('from_pretrained("tester/free")')
    dense = files("dense")["README.md"].decode()
    assert "SparsePath.load" in dense and "select(macs=0.5)" in dense
    assert not any(name.startswith("checkpoint-") for name in files("dense"))
