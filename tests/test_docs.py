"""The documentation is true: its code runs, its links and error texts exist, its tables are of the committed rows."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import LoopbackHub
from transformers import BertConfig, BertModel, BertTokenizer, BitImageProcessorPil, Dinov2Config, Dinov2Model

import hf_effdl


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
QUICKSTARTS = {"README.md": "README.md", "docs/smaller": None, "docs/data": None, "docs/prompts": None}


def pages() -> list[str]:
    """Every page with Python in it; the quickstart of a folder before the pages that begin where it ends."""
    files = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"), key=lambda file: (file.stem != "quickstart", file))]
    texts = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    return [name for name, text in texts.items() if "```python" in text or "| you want | call |" in text]


def start_of(page: str) -> str | None:
    """The page in whose names the blocks of a page begin; the README's blocks begin from nothing, each."""
    quickstart = f"{Path(page).parent.as_posix()}/quickstart.md"
    if page == "README.md":
        return page
    return quickstart if page != quickstart and (ROOT / quickstart).is_file() else None


def tiny_encoder(folder: Path) -> dict[str, bytes]:
    """The files of a DINOv2 of a few thousand weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=56, patch_size=14)).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    BitImageProcessorPil(size={"shortest_edge": 56}, crop_size=size).save_pretrained(folder)
    return contents(folder)


def tiny_sentences(folder: Path) -> dict[str, bytes]:
    """The files of a BERT that knows letters and digits."""
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, list]:
    """What became of every example, run in one process that knows nothing but a loopback Hub."""
    folder = tmp_path_factory.mktemp("docs")
    with LoopbackHub() as hub:
        hub.add("facebook/dinov2-small", tiny_encoder(folder / "encoder"))
        hub.add("sentence-transformers/all-MiniLM-L6-v2", tiny_sentences(folder / "sentences"))
        hub.add("BAAI/seggpt-vit-large", contents(ROOT / "model_cards" / "tiny-seggpt-digits"))
        work = folder / "work"
        work.mkdir()
        command = [sys.executable, str(ROOT / "tests" / "support" / "docs_run.py"), "out.json"]
        done = subprocess.run(
            [*command, *(str(ROOT / page) for page in pages())],
            input=json.dumps({str(ROOT / page): str(ROOT / start) for page in pages() if (start := start_of(page))}),
            env=hub.env(folder / "home") | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
            cwd=work,
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((work / "out.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", pages())
def test_every_block_and_every_row_of_a_page_runs(page, outcomes):
    results = outcomes[str(ROOT / page)]
    assert results, f"{page} has Python that was not found"
    failed = [f"{page}:{line}\n{error}" for line, _, error in results if error]
    assert not failed, "\n".join(failed)
