"""The loopback hub answers the real clients the way the Hub does."""

from http.client import HTTPConnection
from pathlib import Path

import pytest
from hub import TOKEN, LoopbackHub


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


def test_hub_client(hub: LoopbackHub, tmp_path: Path) -> None:
    code = """
    from pathlib import Path

    import pytest
    from huggingface_hub import DatasetCard, HfApi, HfFileSystem, ModelCard, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    )


    def refused(status, call, *args, **kwargs):
        with pytest.raises(HfHubHTTPError) as caught:
            call(*args, **kwargs)
        assert caught.value.response.status_code == status


    def read(*args, **kwargs):
        return Path(hf_hub_download("tester/model", *args, **kwargs)).read_bytes()


    api = HfApi()
    assert api.whoami()["name"] == "tester"
    url = api.create_repo("tester/model")
    assert url.repo_id == "tester/model" and api.create_repo("model", exist_ok=True) == url
    refused(409, api.create_repo, "tester/model")
    refused(403, api.create_repo, "other/model")
    refused(401, HfApi(token="hf_wrong").create_repo, "tester/refused")
    refused(401, HfApi(token=False).create_repo, "tester/refused")
    assert not api.repo_exists("tester/refused")

    folder = Path("folder")
    (folder / "sub").mkdir(parents=True)
    files = {"a.txt": b"one", "empty.bin": b"", "sub/weights.bin": bytes(range(256)) * 4096, "sub/b c.txt": b"b"}
    for path, content in files.items():
        (folder / path).write_bytes(content)
    (folder / "README.md").write_text("---\\nlicense: mit\\n---\\n# Model\\n")
    first = api.upload_folder(folder_path=folder, repo_id="tester/model", commit_message="first")
    assert api.upload_folder(folder_path=folder, repo_id="tester/model").oid == first.oid
    second = api.upload_file(path_or_fileobj=b"two", path_in_repo="a.txt", repo_id="tester/model")
    assert api.model_info("tester/model").sha == second.oid != first.oid
    assert read("a.txt") == b"two" and read("a.txt", revision=first.oid) == b"one"

    snapshot = Path(snapshot_download("tester/model", revision=first.oid))
    assert snapshot.name == first.oid and all((snapshot / path).read_bytes() == files[path] for path in files)
    assert set(api.list_repo_files("tester/model")) == {".gitattributes", "README.md", *files}
    sub = {entry.path: entry for entry in api.list_repo_tree("tester/model", "sub")}
    assert sub.keys() == {"sub/b c.txt", "sub/weights.bin"} and sub["sub/weights.bin"].lfs.size == 2**20
    assert [entry.path for entry in api.get_paths_info("tester/model", ["sub", "absent"])] == ["sub"]
    with HfFileSystem().open("tester/model/sub/weights.bin") as remote:
        remote.seek(-3, 2)
        assert remote.read() == bytes([253, 254, 255])

    api.create_tag("tester/model", tag="v1", revision=first.oid)
    api.create_branch("tester/model", branch="dev/x")
    api.upload_file(path_or_fileobj=b"dev", path_in_repo="a.txt", repo_id="tester/model", revision="dev/x")
    assert [read("a.txt", revision=revision) for revision in ("v1", "dev/x", "main")] == [b"one", b"dev", b"two"]
    refused(
        412, api.upload_file,
        path_or_fileobj=b"late", path_in_repo="a.txt", repo_id="tester/model", parent_commit=first.oid,
    )
    api.delete_file("a.txt", "tester/model")
    api.delete_folder("sub", "tester/model")
    assert set(api.list_repo_files("tester/model")) == {".gitattributes", "README.md", "empty.bin"}

    ModelCard("---\\nlicense: apache-2.0\\n---\\n# Card\\n").push_to_hub("tester/model")
    assert ModelCard.load("tester/model").data.license == "apache-2.0"
    api.create_repo("tester/card", repo_type="dataset")
    DatasetCard("---\\ntags: [pruned]\\n---\\n# Card\\n").push_to_hub("tester/card")
    assert DatasetCard.load("tester/card").data.tags == ["pruned"]
    with pytest.raises(ValueError, match="never closed"):
        api.upload_file(path_or_fileobj=b"---\\nlicense: mit", path_in_repo="README.md", repo_id="tester/model")

    assert api.file_exists("tester/model", "README.md") and not api.file_exists("tester/model", "absent")
    assert api.repo_exists("tester/card", repo_type="dataset") and not api.repo_exists("tester/card")
    assert not api.revision_exists("tester/model", "absent")
    pytest.raises(EntryNotFoundError, read, "absent")
    pytest.raises(RevisionNotFoundError, read, "README.md", revision="absent")
    pytest.raises(RepositoryNotFoundError, hf_hub_download, "tester/absent", "README.md")
    pytest.raises(RepositoryNotFoundError, hf_hub_download, "absent", "README.md")
    api.create_repo("tester/secret", private=True)
    assert api.model_info("tester/secret").private
    pytest.raises(RepositoryNotFoundError, HfApi(token=False).model_info, "tester/secret")
    api.delete_repo("tester/secret")
    assert not api.repo_exists("tester/secret")
    """
    hub.run(code, tmp_path)
    repo = hub.repos["model", "tester/model"]
    assert [commit.title for commit in repo.commits.values()][:2] == ["initial commit", "first"]
    assert repo.head.tree["README.md"].endswith(b"# Card\n")
    assert repo.resolve("v1").tree["a.txt"] == b"one"


def test_models(hub: LoopbackHub, tmp_path: Path) -> None:
    code = """
    import hashlib

    import torch
    from huggingface_hub import PyTorchModelHubMixin
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import (
        AutoImageProcessor, AutoModelForImageClassification, ConvNextImageProcessor, ResNetConfig,
        ResNetForImageClassification, Trainer, TrainingArguments
    )


    class Net(torch.nn.Module, PyTorchModelHubMixin):
        def __init__(self, width: int = 2):
            super().__init__()
            self.head = torch.nn.Linear(width, 1)


    def digest(model):
        return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()


    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=2)
    model = ResNetForImageClassification(config)
    pushed = {"first": [model.push_to_hub("tester/resnet").oid, digest(model)]}
    ConvNextImageProcessor(size={"shortest_edge": 32}).push_to_hub("tester/resnet")

    args = TrainingArguments(
        "out", push_to_hub=True, hub_model_id="tester/trained", max_steps=2, save_steps=1, report_to="none",
        use_cpu=True, disable_tqdm=True,
    )
    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": index % 2} for index in range(8)]
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    pushed["trained"] = [trainer.push_to_hub().oid, digest(model)]
    pushed["second"] = [model.push_to_hub("tester/resnet").oid, digest(model)]

    net = Net(width=5)
    pushed["net"] = [net.push_to_hub("tester/net").oid, digest(net)]
    tuned = get_peft_model(model, LoraConfig(target_modules=["convolution"], r=2, init_lora_weights=False))
    pushed["tuned"] = [tuned.push_to_hub("tester/tuned").oid, digest(tuned)]
    def load(repo_id, revision):
        return AutoModelForImageClassification.from_pretrained(repo_id, revision=revision)


    assert AutoImageProcessor.from_pretrained("tester/resnet").size["shortest_edge"] == 32
    assert digest(load("tester/resnet", pushed["first"][0])) == pushed["first"][1] != pushed["second"][1]
    assert digest(load("tester/resnet", "main")) == pushed["second"][1]
    assert digest(load("tester/trained", pushed["trained"][0])) == pushed["trained"][1]
    assert digest(Net.from_pretrained("tester/net")) == pushed["net"][1]
    assert digest(PeftModel.from_pretrained(load("tester/resnet", "main"), "tester/tuned")) == pushed["tuned"][1]
    try:
        load("tester/absent", "main")
    except OSError as error:
        assert "not a valid model identifier" in str(error)
    else:
        raise AssertionError("a model that does not exist was loaded")
    """
    hub.run(code, tmp_path)
    trained = hub.repos["model", "tester/trained"]
    assert {"README.md", "config.json", "model.safetensors", "training_args.bin"} <= trained.head.tree.keys()


def test_datasets(hub: LoopbackHub, tmp_path: Path) -> None:
    code = """
    from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from PIL import Image as Picture

    features = Features({"image": Image(), "label": Value("int64")})
    rows = {"image": [Picture.new("RGB", (4, 4), (i, 0, 0)) for i in range(20)], "label": list(range(20))}
    train = Dataset.from_dict(rows, features)
    train.push_to_hub("tester/data", num_shards=2)
    DatasetDict(train=train, test=train.select(range(3))).push_to_hub("tester/data", "both")

    train = load_dataset("tester/data", split="train")
    assert train["label"][:] == list(range(20)) and train[7]["image"].getpixel((0, 0)) == (7, 0, 0)
    stream = load_dataset("tester/data", split="train", streaming=True)
    assert [row["label"] for row in stream] == list(range(20))
    assert next(iter(stream.skip(15)))["image"].getpixel((0, 0)) == (15, 0, 0)
    assert load_dataset("tester/data", "both").num_rows == {"train": 20, "test": 3}
    try:
        load_dataset("tester/absent")
    except DatasetNotFoundError:
        pass
    else:
        raise AssertionError("a dataset that does not exist was loaded")
    """
    hub.run(code, tmp_path)
    shards = [path for path in hub.repos["dataset", "tester/data"].head.tree if path.startswith("data/")]
    assert shards == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]


def test_stray_requests_are_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    code = """
    from urllib.error import URLError
    from urllib.request import urlopen

    for url in ("https://example.com/", "http://example.com/api/models/tester/model"):
        try:
            urlopen(url)
        except URLError:
            pass
        else:
            raise AssertionError(f"{url} was answered")
    """
    hub.run(code, tmp_path)
    assert hub.log[-2:] == ["CONNECT example.com:443", "GET http://example.com/api/models/tester/model"]


def test_run_shows_what_went_wrong(hub: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no such luck"):
        hub.run("raise ValueError('no such luck')", tmp_path)


@pytest.mark.parametrize(
    ("asked", "status", "part", "answered"),
    [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
    ],
)
def test_one_connection(hub: LoopbackHub, asked: str, status: int, part: bytes, answered: str) -> None:
    commit = hub.add("org/range", {"digits.txt": b"0123456789"}).head
    host, port = hub.server_address
    connection = HTTPConnection(host, port)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    # Whatever a HEAD or a refusal left unread would garble the answers that follow.
    connection.request("HEAD", "/org/range/resolve/main/digits.txt", headers=headers)
    reply = connection.getresponse()
    assert (reply.status, reply.headers["Content-Length"], reply.read()) == (200, "10", b"")
    assert reply.headers["X-Repo-Commit"] == commit.oid
    connection.request("HEAD", "/org/range/resolve/main/absent.txt", headers=headers)
    reply = connection.getresponse()
    assert (reply.status, reply.headers["X-Error-Code"], reply.read()) == (404, "EntryNotFound", b"")
    connection.request("POST", "/api/models/org/range/commit/main", body=b"unread" * 999)
    reply = connection.getresponse()
    assert (reply.status, bool(reply.read())) == (401, True)
    connection.request("GET", "/org/range/resolve/main/digits.txt", headers={"Range": asked})
    reply = connection.getresponse()
    assert (reply.status, reply.read(), reply.headers["Content-Range"]) == (status, part, answered)
    connection.close()
