"""Files are written whole or not at all, and a damaged one is named."""

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save, save_file

from hf_effdl import files, processes
from hf_effdl.vicl.remote_code import writing


def test_bytes_text_and_what_a_function_writes_arrive(tmp_path):
    assert files.write_whole(tmp_path / "new" / "a.bin", b"\x00\xff").read_bytes() == b"\x00\xff"
    assert files.write_whole(tmp_path / "a.txt", "naïve").read_text(encoding="utf-8") == "naïve"
    seen = []
    files.write_whole(tmp_path / "a.json", lambda part: (seen.append(part.suffix), part.write_text("1")))
    assert files.read_json(tmp_path / "a.json") == 1 and seen == [".json"]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.txt", "new"]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    target = files.write_whole(tmp_path / "kept.txt", "old")

    def fails(part):
        part.write_text("half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_whole(target, fails)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["kept.txt"]


def test_sweeping_takes_what_killed_writers_left_and_nothing_else(tmp_path):
    kept = [files.write_whole(tmp_path / name, b"") for name in ("a-1.bin", ".hidden", ".b-1.bin.x", "a-1.bin.x")]
    files.write_whole(tmp_path / ".a-1.bin.k3j" / "a-1.bin", b"half")
    (tmp_path / ".a-2.bin.tmp").write_bytes(b"half")
    files.sweep(tmp_path, "a-*.bin")
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_killed_at_any_moment_the_file_is_the_old_one_or_the_new_one(tmp_path):
    code = (
        "import sys; from hf_effdl.files import write_whole\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for letter in 'ab': write_whole(sys.argv[1], letter * 200_000)\n"
    )
    target = tmp_path / "letters.txt"
    process = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.5)
    process.kill()
    process.wait()
    assert target.read_text() in ("a" * 200_000, "b" * 200_000)


def test_what_is_written_has_reached_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(files.os, "fsync", lambda handle: calls.append("sync"))
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda *names: (calls.append("name"), replace(*names)))
    files.write_whole(tmp_path / "a", "a")
    assert calls == ["sync", "name", "sync"]


@pytest.mark.parametrize("read", [files.read_whole, files.read_tensors, files.read_json])
def test_a_flipped_bit_is_named(read, tmp_path):
    content = json.dumps([1, 2]).encode() if read is files.read_json else save({"a": torch.arange(3.0)})
    file = files.write_whole(tmp_path / "thing", content)
    read(file, files.digest(content))
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"thing is damaged .*; build it again"):
        read(file, files.digest(content), "build it again")


@pytest.mark.parametrize("read", [files.read_tensors, files.read_json])
def test_what_cannot_be_read_is_named_without_a_digest_too(read, tmp_path):
    with pytest.raises(ValueError, match="thing is damaged"):
        read(files.write_whole(tmp_path / "thing", b"\x80" * 20))
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent")


def test_digests_of_bytes_texts_files_and_pieces(tmp_path):
    file = files.write_whole(tmp_path / "abc", "abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of "abc", FIPS 180-2
    assert files.digest(file) == files.digest("abc") == files.digest(b"abc") == known
    assert files.digest([b"a", b"bc"]) != files.digest([b"ab", b"c"])


def test_one_process_is_the_first_and_waits_for_nobody():
    assert processes.is_first() and processes.agreed([1, "a"]) == [1, "a"]
    processes.together()


def test_a_copy_of_a_prepared_model_is_free_of_accelerates_marks(monkeypatch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # else the first Accelerator of the process decides on the precision of all
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    model = torch.nn.Linear(2, 2)
    before = set(vars(model))
    Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert set(vars(model)) > before  # upstream's names may change: then this test, not a user, finds out
    assert processes.forget_accelerate(model)
    assert set(vars(model)) == before and model(torch.ones(1, 2)).dtype == torch.float32
    assert not processes.forget_accelerate(model)


# ---- checkpoints: a config, weights and other files


def checkpoint(text, weights):
    def write(folder):
        for name in ("config.json", weights, "tokenizer.json"):
            (folder / name).write_text(text)

    return write


def saved_here(folder, text, weights="model.safetensors"):
    with files.locked(folder), files.filled_beside(folder) as part:
        checkpoint(text, weights)(part)


def saved_by_code_that_travels(folder, text, weights="model.safetensors"):
    writing.save_whole(checkpoint(text, weights), folder)


SAVERS = [(saved_here, weights) for weights in files.WEIGHTS]
SAVERS += [(saved_by_code_that_travels, weights) for weights in writing.WEIGHTS]


@pytest.mark.parametrize("save, weights", SAVERS)
@pytest.mark.parametrize("moment", range(4))
def test_killed_between_two_files_a_checkpoint_is_of_before_of_now_or_without_weights(
    save, weights, moment, tmp_path, monkeypatch
):
    save(tmp_path, "old", weights if "adapter" in weights else "model.safetensors")
    replace, left = os.replace, iter(range(moment))

    def killed(*names):
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(*names)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        save(tmp_path, "new", weights)
    there = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert len(set(there.values())) == 1 or not files.WEIGHTS.keys() & there.keys()
    (tmp_path / ".saving.x").mkdir()  # what a killed run leaves
    save(tmp_path, "new", weights)
    names = ("config.json", weights, "tokenizer.json")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(names, "new")


@pytest.mark.parametrize("save", [saved_here, saved_by_code_that_travels])
def test_two_who_save_into_one_folder_do_so_one_after_the_other(save, tmp_path, monkeypatch):
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (time.sleep(0.002), replace(*names)))
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(save, tmp_path, str(turn)) for turn in range(12)]:
            done.result()
    assert len({file.read_text() for file in tmp_path.iterdir()}) == 1 and len(list(tmp_path.iterdir())) == 3


# ---- locks and seals


def count_up(folder, times):
    for _ in range(times):
        with files.locked(folder):
            number = int((folder / "number").read_text())
            (folder / "number").write_text(str(number + 1))


def test_a_locked_folder_belongs_to_one_at_a_time(tmp_path):
    (tmp_path / "number").write_text("0")
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(count_up, tmp_path, 25) for _ in range(4)]:
            done.result()
    assert (tmp_path / "number").read_text() == "100" and [path.name for path in tmp_path.iterdir()] == ["number"]


def test_a_lock_goes_with_an_error(tmp_path):
    with pytest.raises(KeyError), files.locked(tmp_path / "new"):
        raise KeyError
    with files.locked(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()


def test_every_flipped_bit_of_a_sealed_file_is_noticed_or_without_effect(tmp_path):
    tensors = {"b": torch.rand(7), "a": torch.arange(5), "none": torch.zeros(0, 3), "one": torch.tensor(2.0)}
    whole, file = files.sealed(tensors, {"note": "x"}), tmp_path / "x.safetensors"
    assert whole == files.sealed(dict(reversed(tensors.items())), {"note": "x"})
    rng = random.Random(0)
    for _ in range(150):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        try:
            found, notes = files.read_sealed(file)
        except ValueError as error:
            assert str(error).startswith(f"{file} is damaged")
        else:
            assert notes == {"note": "x"} and {*found} == {*tensors}
            assert all(found[name].equal(tensors[name]) for name in tensors)
    save_file({"a": torch.ones(2)}, file)
    assert files.read_sealed(file)[1] is None  # of an earlier version
