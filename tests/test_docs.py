"""The documentation is true: its code runs, its links and error texts exist, its tables are of the committed rows."""

import ast
import hashlib
import json
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import chat
import pytest
import torch
from docs_run import ROW, TABLE, rows
from hub import LoopbackHub
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
)

import hf_effdl


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)\s]+)\)")


def pages() -> list[str]:
    """Every page with Python in it; the quickstart of a folder before the pages that begin where it ends."""
    files = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"), key=lambda file: (file.stem != "quickstart", file))]
    texts = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    return [name for name, text in texts.items() if "```python" in text or TABLE in text]


def start_of(page: str) -> str | None:
    """The page in whose names the blocks of a page begin; the README's blocks begin from nothing, each."""
    quickstart = f"{Path(page).parent.as_posix()}/quickstart.md"
    if page == "README.md":
        return page
    return quickstart if page != quickstart and quickstart in pages() else None


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


def tiny_chat(folder: Path) -> dict[str, bytes]:
    """The files of a Llama that reads bytes, with a chat template."""
    alphabet = ["<pad>", "<end>", *sorted(ByteLevel.alphabet())]
    text = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    text.pre_tokenizer, text.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = chat.TEMPLATE.replace("[EOS]", "<end>")
    tokenizer.save_pretrained(folder)
    chat.llama(vocab_size=len(alphabet), eos_token_id=1).save_pretrained(folder)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def first_pages() -> list[str]:
    """What a newcomer pastes from."""
    return [page for page in pages() if page == "README.md" or page.endswith("quickstart.md")]


@pytest.fixture(scope="module", params=[first_pages, pytest.param(pages, marks=pytest.mark.slow)])
def outcomes(request, tmp_path_factory) -> dict[str, list]:
    """What became of every example, run in one process that knows nothing but a loopback Hub."""
    folder = tmp_path_factory.mktemp("docs")
    with LoopbackHub() as hub:
        hub.add("facebook/dinov2-small", tiny_encoder(folder / "encoder"))
        hub.add("sentence-transformers/all-MiniLM-L6-v2", tiny_sentences(folder / "sentences"))
        hub.add("HuggingFaceTB/SmolLM2-135M-Instruct", tiny_chat(folder / "chat"))
        hub.add("BAAI/seggpt-vit-large", contents(ROOT / "model_cards" / "tiny-seggpt-digits"))
        work = folder / "work"
        work.mkdir()
        command = [sys.executable, str(ROOT / "tests" / "support" / "docs_run.py"), "out.json"]
        done = subprocess.run(
            [*command, *(str(ROOT / page) for page in request.param())],
            input=json.dumps({str(ROOT / page): str(ROOT / start) for page in pages() if (start := start_of(page))}),
            env=hub.env(folder / "home") | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
            cwd=work,
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((work / "out.json").read_text(encoding="utf-8"))


def test_every_block_and_every_row_of_the_pages_runs(outcomes):
    empty = [page for page, results in outcomes.items() if not results]
    assert not empty, f"{empty} have Python that was not found"
    failed = [f"{page}:{line}\n{error}" for page, results in outcomes.items() for line, _, error in results if error]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("page", pages())
def test_every_row_is_one_call_that_can_be_pasted(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [line for _, line in rows(text)]
    assert not [line for line in found if not ROW.fullmatch(line)]
    assert len(found) >= text.count(TABLE)


# ---- texts


def prose(file: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("file", [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))], ids=lambda file: file.name)
def test_links_within_the_repository_lead_somewhere(file):
    links = [link.partition("#")[0] for link in LINK.findall(prose(file)) if not link.startswith(("http", "mailto"))]
    assert not [link for link in links if link and not (file.parent / link).exists()]


def test_the_readme_is_short_and_its_links_are_absolute_on_an_index():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160 and "make demo" in text and "make test" in text
    links = LINK.findall(runpy.run_path(str(ROOT / "setup.py"))["index_readme"]())
    assert len(links) == len(LINK.findall(text)) and all(link.startswith("https://") for link in links)
    pictures = [link for link in links if link.endswith(".png")]
    assert pictures and all("/raw/main/" in link for link in pictures)


@cache
def strings_of_the_package() -> list[str]:
    """Every text in the package's code; what an f-string fills in is `...`."""
    texts = []
    for file in Path(hf_effdl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def error_texts() -> list[str]:
    own = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition("## Texts of others")[0]
    return [row[1] for row in re.finditer(r"^\| `([^`]+)`", own, re.MULTILINE)]


@pytest.mark.parametrize("text", error_texts())
def test_every_error_of_the_troubleshooting_page_exists(text):
    wanted = re.compile(".*".join(re.escape(part.strip()) for part in text.split("...")), re.DOTALL)
    assert any(wanted.search(string) for string in strings_of_the_package()), text


def test_the_reference_lists_every_public_name_once():
    text = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^   (\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(set(hf_effdl.__all__) - {"__version__"})


@pytest.mark.parametrize("file", sorted((DOCS / "benchmarks" / "tables").glob("*.md")), ids=lambda file: file.stem)
def test_tables_are_of_the_committed_rows(file):
    text = file.read_text(encoding="utf-8")
    rows, digest = re.match(r"<!-- made by .* from (\S+), SHA-256 (\w+) -->", text).groups()
    assert hashlib.sha256((ROOT / rows).read_bytes()).hexdigest() == digest, "run python docs/make_benchmarks.py"
    assert f"tables/{file.name}" in "".join(page.read_text(encoding="utf-8") for page in file.parents[1].glob("*.md"))


def test_versions_agree():
    sections = re.findall(r"^## \[([^]]+)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert sections[0][0] == hf_effdl.__version__
    released = [section for section in sections if "dev" not in section[0]]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    said = [re.search(rf"^{name}: (\S+)$", citation, re.MULTILINE)[1] for name in ("version", "date-released")]
    assert said == list(released[0])
    cards = [card.read_text(encoding="utf-8") for card in (ROOT / "model_cards").rglob("*.md")]
    assert {version for card in cards for version in re.findall(r"Made with hf_effdl (\d[\w.]*\w)", card)} <= {
        version for version, _ in sections
    }


def test_code_that_travels_to_the_hub_does_what_security_says():
    """Starts no process, opens no socket of its own, unpickles nothing and evaluates no text."""
    for file in (Path(hf_effdl.__file__).parent / "vicl" / "remote_code").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"subprocess", "socket", "pickle", "ctypes", "urllib"}
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in "eval exec compile __import__ os.system torch.load".split()


def test_formulas_and_fences_of_docstrings_become_literal_blocks(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    from docstrings import rendered

    lines = rendered(["With |w| small,", "", "    a <- |b|", "", "of `Group`s:", "", "```python", "run(a | b)", "```"])
    assert "With \\|w\\| small," in lines and "of `Group`\\ s:" in lines
    assert "::" in lines and "    a <- |b|" in lines
    assert ".. code-block:: python" in lines and "    run(a | b)" in lines and "```" not in lines
