"""Files of structure that are damaged or forged: refused in a sentence of ours, quickly, whatever they hold."""

import copy
import json
import random
import time
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn
from transformers import AutoConfig, ResNetConfig, ResNetForImageClassification

from hf_effdl import (
    EarlyTicketCallback,
    SparsePath,
    SplitLBI,
    SplitLBIArguments,
    Ticket,
    deepen,
    derive_path,
    find_groups,
    find_ticket,
    param_groups,
    recalibrate_batch_norm,
    rewind,
    slim,
    transfer,
    widen,
)
from hf_effdl.structure.groups.slim_config import SlimConfig
from hf_effdl.structure.growing.checkpoint import saved_history
from hf_effdl.structure.path.settling import unpack


OURS = (ValueError, TypeError, FileNotFoundError)
HUGE = 10**12
NASTY = (None, True, -1, 0, 1.5, HUGE, 10**30, float("nan"), float("inf"), "x", "", [], {}, [[]], {"a": {"b": [1]}})


def net():
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(128, 5))


@pytest.fixture(scope="module")
def groups():
    return find_groups(net(), torch.rand(1, 1, 8, 8))


@pytest.fixture
def path(groups):
    kinds = {"entered": torch.int64, "left": torch.int64, "threshold": torch.float32}
    kinds |= {"dual": torch.float32, "weight": torch.float32}
    units = {g.name: {key: torch.arange(g.units).to(kind) for key, kind in kinds.items()} for g in groups}
    return SparsePath(groups, units, 30, curve=[{"macs": 0.5, "accuracy": 0.9}])


@pytest.fixture
def ticket(groups):
    kept = {group.name: torch.arange(3) for group in groups}
    distances = [{"step": 2, "path": 0.5, "change": None, "distance": 0.0}]
    return Ticket(groups, kept, 4, True, distances, {"seed": 0}, {0: net().state_dict()})


def plain(value):
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (SparsePath, Ticket)):
        return plain({**vars(value), "groups": [(group.to_dict(), repr(group.network)) for group in value.groups]})
    return repr(value)


def flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def test_no_bit_of_a_path_flips_unnoticed(path, tmp_path):
    file, draw = path.save(tmp_path), random.Random(0)
    whole, expected = file.read_bytes(), plain(SparsePath.load(tmp_path))
    refused = 0
    for _ in range(100):
        file.write_bytes(flipped(whole, draw))
        try:
            assert plain(SparsePath.load(tmp_path)) == expected
        except ValueError as error:
            assert str(file) in str(error) and "is damaged" in str(error)
            refused += 1
    assert refused > 90


def test_no_bit_of_a_ticket_flips_unnoticed(ticket, tmp_path):
    ticket.save_pretrained(tmp_path)
    expected, draw = plain(Ticket.from_pretrained(tmp_path)), random.Random(0)
    for file in sorted(tmp_path.glob("ticket.*")) + sorted(tmp_path.glob("weights-*")):
        whole = file.read_bytes()
        for _ in range(40):
            file.write_bytes(flipped(whole, draw))
            try:
                assert plain(Ticket.from_pretrained(tmp_path)) == expected
            except ValueError as error:
                assert "cannot be read" in str(error)
        file.write_bytes(whole)


# ---- forged


def places(value, at=()):
    """Every place in nested plain values, as the keys that lead there."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield from places(entry, (*at, key))


def forged(record, draw):
    """A record with something else at a random place."""
    record = copy.deepcopy(record)
    *way, last = draw.choice([place for place in places(record) if place])
    holder = record
    for key in way:
        holder = holder[key]
    if draw.random() < 0.2 and isinstance(holder, dict):
        del holder[last]
    else:
        holder[last] = draw.choice(NASTY)
    return record


def quickly(read, *args):
    start = time.process_time()
    try:
        value = read(*args)
    except OURS as error:
        value = None
        assert str(error)
    assert time.process_time() - start < 2
    return value


def header_of(raw):
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_forged_paths_are_refused_or_whole(path, tmp_path, seed):
    file, draw = path.save(tmp_path), random.Random(seed)
    meta = json.loads(header_of(file.read_bytes())["__metadata__"]["sparse_path"])
    del meta["format"]  # as 0.1.0 wrote it, without a digest
    tensors = {f"{name}|{key}": value for name, unit in path.units.items() for key, value in unit.items()}
    tensors = {name: value.int() if value.dtype == torch.int64 else value for name, value in tensors.items()}
    for _ in range(60):
        file.write_bytes(save(tensors, metadata={"sparse_path": json.dumps(forged(meta, draw))}))
        read = quickly(SparsePath.load, tmp_path)
        if read is not None:
            read.support_share(), read.scores(), str(read.groups[0])
            quickly(lambda read=read: read.select(macs=0.5))
    for name in tensors:
        without = {key: value for key, value in tensors.items() if key != name}
        bad = {**tensors, name: torch.full_like(tensors[name], 99).float() * float("nan")}
        for content in (without, bad, {**tensors, name: tensors[name][:2]}, {**tensors, name: tensors[name].double()}):
            save_file(content, file, metadata={"sparse_path": json.dumps(meta)})
            with pytest.raises(ValueError, match="is damaged"):
                SparsePath.load(tmp_path)
    for text in ("[" * 100_000, "null", "{}", "NaN"):
        file.write_bytes(save(tensors, metadata={"sparse_path": text}))
        with pytest.raises(ValueError, match="is damaged"):
            SparsePath.load(tmp_path)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_forged_tickets_are_refused_or_whole(ticket, tmp_path, seed):
    ticket.save_pretrained(tmp_path)
    file, draw = tmp_path / "ticket.json", random.Random(seed)
    record = json.loads(file.read_text())
    del record["sha256_of_this"]
    for _ in range(60):
        file.write_text(json.dumps(forged(record, draw)))
        read = quickly(Ticket.from_pretrained, tmp_path)
        if read is not None:
            read.report()
    for text in ("[" * 100_000, "null", "[]", "7"):
        file.write_text(text)
        with pytest.raises(ValueError, match="cannot be read"):
            Ticket.from_pretrained(tmp_path)


def test_weights_of_a_ticket_that_lack_a_tensor_are_refused_by_its_name(ticket, tmp_path):
    ticket.weights[0].pop("3.weight")
    ticket.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights-0.safetensors has 3.weight not at all"):
        Ticket.from_pretrained(tmp_path)


ROW = {"round": 1, "step": 4, "group": "0", "from": 4, "to": 6, "support": 0.5, "macs": 10, "params": 3}


def test_forged_growth_histories_are_refused(tmp_path):
    draw, whole = random.Random(0), {"history": [{**ROW, "training_macs": 7, "loss": 0.5}]}
    state = tmp_path / "trainer_state.json"

    def write(attributes):
        state.write_text(json.dumps({"stateful_callbacks": {"GrowthCallback": {"attributes": attributes}}}))

    write(whole)
    assert saved_history(tmp_path) == whole["history"]
    for _ in range(60):
        write(forged(whole, draw))
        quickly(saved_history, tmp_path)
    for text in ("[" * 100_000, "null", json.dumps({"stateful_callbacks": []})):
        state.write_text(text)
        with pytest.raises(ValueError):
            saved_history(tmp_path)


def test_a_packed_selection_of_any_other_length_is_refused():
    for text in ("1000000000000:ff", "x:ff", "", "8:", "8:zz", "3:ffff"):
        with pytest.raises(ValueError):
            unpack(text)


def test_forged_slim_sizes_are_refused(tmp_path):
    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    model = ResNetForImageClassification(config)
    small = slim(
        model,
        find_groups(model, torch.rand(1, 1, 16, 16)),
        {"resnet.encoder.stages.0.layers.0.layer.0.convolution": [0, 2]},
    )
    small.save_pretrained(tmp_path)
    file, draw = tmp_path / "config.json", random.Random(0)
    whole = json.loads(file.read_text())
    for number in range(30):
        sizes = forged(whole["quantization_config"], draw)
        if number == 0:
            sizes = {**whole["quantization_config"], "layers": {"2": [HUGE, None]}}
        file.write_text(json.dumps({**whole, "quantization_config": sizes}))
        start = time.process_time()
        try:
            SlimConfig.from_dict({key: value for key, value in sizes.items() if key != "quant_method"})
        except OURS as error:
            assert str(error)
        assert time.process_time() - start < 2
    file.write_text(json.dumps(whole))
    assert AutoConfig.from_pretrained(tmp_path).quantization_config


# ---- public names, any input


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([HUGE, -HUGE, 0.5, 1.0, 1e-300, 1e300, float("nan"), float("inf")]),
    st.text(max_size=4),
    st.lists(st.integers(-2, 9), max_size=4),
    st.sampled_from([torch.zeros(0), torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor(float("nan"))]),
    st.dictionaries(st.sampled_from(["0", "3", "x"]), st.lists(st.integers(-2, 9), max_size=3), max_size=2),
)


def calls(groups):
    """Every public name that takes settings or models, by what it is given."""
    units = {
        group.name: {
            "entered": torch.arange(group.units),
            "left": torch.full((group.units,), -1),
            **{key: torch.arange(1.0, group.units + 1) for key in ("threshold", "dual", "weight")},
        }
        for group in groups
    }
    path = SparsePath(groups, units, 30)
    whole = Ticket(groups, {group.name: torch.arange(3) for group in groups}, 4, weights={4: net().state_dict()})

    def named(function, names, **settings):
        return [lambda value, name=name: function(**(settings | {name: value})) for name in names.split()]

    return [
        lambda value: slim(net(), groups, value)(torch.rand(1, 1, 8, 8)),
        lambda value: slim(value, groups, 0.5),
        lambda value: slim(net(), value, 0.5),
        *named(partial(slim, net(), groups, 0.5), "round_to"),
        *named(path.select, "macs keep"),
        *named(partial(path.select, macs=0.5), "order widths round_to least"),
        *named(
            partial(SplitLBI, param_groups(net(), [])),
            "lr kappa nu momentum lam path_scale weight_decay base lam_scale",
            lr=0.1,
        ),
        *named(derive_path, "lam kappa path_length ridge_length base total_lr start nu", total_lr=1.0),
        *named(
            partial(EarlyTicketCallback, groups),
            "macs every threshold window patience min_path within at_step at_epoch order widths",
        ),
        *named(
            partial(SplitLBIArguments, "out", use_cpu=True, report_to=[]),
            "preset kappa nu path_scale lam lam_scale base momentum path_length path_share learning_rate start "
            "distill",
        ),
        lambda value: Ticket(groups, value, 4),
        lambda value: Ticket(groups, {"0": value}, 4),
        lambda value: rewind(net(), value),
        lambda value: rewind(net(), whole, value),
        lambda value: transfer(whole, value),
        lambda value: transfer(whole, net(), to=value),
        lambda value: find_ticket(value),
        lambda value: SparsePath.from_optimizer(value, groups),
        lambda value: find_groups(value, value),
        lambda value: find_groups(net(), value),
        lambda value: param_groups(net(), value),
        lambda value: param_groups(value, groups),
        lambda value: widen(value, groups, {"0": 1}),
        lambda value: deepen(value, 1),
        lambda value: recalibrate_batch_norm(value, []),
    ]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(value=ANYTHING)
def test_public_names_take_anything_or_say_what_is_wrong(groups, value):
    for call in calls(groups):
        try:
            call(value)
        except OURS as error:
            assert str(error)
