import json
import multiprocessing
import os
import random
import time

import pytest
import torch

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.records.checkpoint import (
    flatten_state,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    unflatten_state,
)

WEIGHTS = {
    "bf16": torch.tensor([1.0, -0.0, float("nan"), 3e38], dtype=torch.bfloat16),
    "f64": torch.tensor([[1 / 3, 2e-300]], dtype=torch.float64),
    "step": torch.tensor(7.0),
    "ids": torch.tensor([[-1, 2**62]]),
    "mask": torch.tensor([True, False]),
    "none": torch.empty(0, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [x.contiguous().flatten().view(torch.uint8) for x in (a.reshape(-1), b.reshape(-1))]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def save(folder, step, **options):
    return save_checkpoint(folder, step, tensors={"policy": WEIGHTS}, state={"beta": 0.1}, **options)


def test_what_is_saved_is_loaded_bit_by_bit(tmp_path):
    path = save_checkpoint(
        tmp_path / "checkpoints",
        120,
        tensors={"policy": WEIGHTS, "empty": {}},
        state={"beta": 0.1, "cursor": [3, None]},
    )
    assert path == tmp_path / "checkpoints" / "step-00000120"
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.state, loaded.path) == (120, {"beta": 0.1, "cursor": [3, None]}, path)
    assert loaded.tensors.keys() == {"policy", "empty"} and loaded.tensors["empty"] == {}
    assert loaded.tensors["policy"].keys() == WEIGHTS.keys()
    assert all(same_bits(loaded.tensors["policy"][name], tensor) for name, tensor in WEIGHTS.items())


def test_tied_weights_and_views_of_one_storage_are_each_saved(tmp_path):
    weight = torch.arange(6.0).reshape(3, 2)
    tied = {"embedding": weight, "head": weight, "row": weight[1], "parameter": torch.nn.Parameter(weight)}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, tensors={"m": tied}, state={})).tensors["m"]
    assert all(torch.equal(loaded[name], tied[name]) for name in tied)


def test_the_model_folder_is_part_of_the_checkpoint(tmp_path):
    def write_model(folder):
        (folder / "config.json").write_text("{}")

    path = save(tmp_path, 1, write_model=write_model)
    assert (load_checkpoint(path).path / "model" / "config.json").read_text() == "{}"
    (path / "model" / "config.json").write_text("[]")
    with pytest.raises(DataError, match="model/config.json: not the file that was saved"):
        load_checkpoint(path)


def test_older_checkpoints_are_dropped_and_the_newest_stays(tmp_path):
    for step in (5, 10, 100, 1000):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-00001000"]
    save(tmp_path, 1001, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00001001"]
    with pytest.raises(ConfigError, match="keep must be at least 1"):
        save(tmp_path, 1002, keep=0)


def test_going_back_replaces_a_step_and_touches_no_later_one(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
    save_checkpoint(tmp_path, 2, tensors={}, state={"again": True}, keep=1)
    assert load_checkpoint(tmp_path / "step-00000002").state == {"again": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_save_that_fails_leaves_the_checkpoints_as_they_were(tmp_path):
    newest = save(tmp_path, 1)

    def fail(folder):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2, write_model=fail)
    with pytest.raises(DataError, match="cannot write 'beta'"):
        save_checkpoint(tmp_path, 2, tensors={}, state={"beta": float("nan")})
    assert latest_checkpoint(tmp_path) == newest
    assert save(tmp_path, 2) == latest_checkpoint(tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))


def test_there_may_be_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "nothing") is None
    (tmp_path / ".tmp-00000001").mkdir()
    (tmp_path / "step-final").mkdir()
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("damage", ["no manifest", "bad manifest", "file missing", "file cut", "file added"])
def test_an_incomplete_checkpoint_is_passed_over_and_cannot_be_loaded(tmp_path, damage):
    good, newest = save(tmp_path, 1), save(tmp_path, 2)
    name = "manifest.json" if "manifest" in damage else "policy.safetensors"
    match damage:
        case "no manifest" | "file missing":
            (newest / name).unlink()
        case "bad manifest":
            (newest / name).write_text('{"format": 1, "step": 2, "files"')
        case "file cut":
            (newest / name).write_bytes((newest / name).read_bytes()[:-1])
        case "file added":
            name = "evil.pkl"
            (newest / name).write_bytes(b"cos\nsystem\n")
    assert latest_checkpoint(tmp_path) == good
    with pytest.raises(DataError, match=name):
        load_checkpoint(newest)


@pytest.mark.parametrize("name", ["policy.safetensors", "state.json"])
def test_one_changed_byte_is_an_error_that_names_the_file(tmp_path, name):
    path = save(tmp_path, 1)
    data = bytearray((path / name).read_bytes())
    data[-3] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}: not the file that was saved"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"format": 2, "step": 1, "files": {}},
        {"format": 1, "step": 1},
        {"format": 1, "step": "1", "files": {}},
        {"format": 1, "step": 1, "files": ["state.json"]},
        {"format": 1, "step": 1, "files": {"state.json": 3}},
        {"format": 1, "step": 1, "files": {"../outside": {"size": 1, "sha256": ""}}},
    ],
)
def test_a_forged_manifest_is_refused(tmp_path, manifest):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=str(path)):
        load_checkpoint(path)


def save_for_ever(folder):
    step = int(latest_checkpoint(folder).name.removeprefix("step-")) if latest_checkpoint(folder) else 0
    while True:
        step += 1
        save_checkpoint(folder, step, tensors={"m": {"w": torch.full((5000,), float(step))}}, state={"step": step})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the saving process")
def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    draw = random.Random(0)
    save_checkpoint(tmp_path, 0, tensors={"m": {"w": torch.zeros(5000)}}, state={"step": 0})
    reached = partial = 0
    for _ in range(50):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(tmp_path,))
        process.start()
        time.sleep(draw.uniform(0.005, 0.06))
        process.kill()
        process.join()
        partial += bool(list(tmp_path.glob(".tmp-*")))
        path = latest_checkpoint(tmp_path)
        assert path is not None
        loaded = load_checkpoint(path)
        assert loaded.step >= reached
        assert loaded.state == {"step": loaded.step}
        assert torch.equal(loaded.tensors["m"]["w"], torch.full((5000,), float(loaded.step)))
        # The last folder in name is complete too: nothing was passed over.
        assert path == max(tmp_path.glob("step-*"))
        reached = loaded.step
    assert reached > 0 and partial > 0, "no kill came while a checkpoint was being written"


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_goes_on_bit_by_bit_after_its_state_was_stored(tmp_path, optimizer_class):
    def start():
        layer = torch.nn.Linear(3, 2)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
        return layer, optimizer_class([{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.03}], lr=0.1)

    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.tensor([[0.3, -0.2, 0.9]])).square().sum().backward()
        optimizer.step()

    layer, optimizer = start()
    for _ in range(3):
        step(layer, optimizer)
    tensors, tree = flatten_state(optimizer.state_dict())
    path = save_checkpoint(tmp_path, 3, tensors={"optimizer": tensors, "layer": layer.state_dict()}, state=tree)

    loaded = load_checkpoint(path)
    layer_2, optimizer_2 = start()
    layer_2.load_state_dict(loaded.tensors["layer"])
    optimizer_2.load_state_dict(unflatten_state(loaded.tensors["optimizer"], loaded.state))
    for _ in range(3):
        step(layer, optimizer)
        step(layer_2, optimizer_2)
    assert torch.equal(layer.weight, layer_2.weight) and torch.equal(layer.bias, layer_2.bias)


def test_flattened_state_keeps_types_keys_and_order():
    state = {
        "b": (0.9, 0.999),
        0: [None, True, "x"],
        "tensor": {"dict": {}, 1: ()},
        "t": torch.ones(2),
        "a/b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
    }
    tensors, tree = flatten_state(state)
    back = unflatten_state(tensors, json.loads(json.dumps(tree)))
    assert list(back) == ["b", 0, "tensor", "t", "a/b", "a"]
    assert back["b"] == (0.9, 0.999) and back[0] == [None, True, "x"] and back["tensor"] == {"dict": {}, 1: ()}
    assert torch.equal(back["t"], torch.ones(2))
    assert torch.equal(back["a/b"], torch.zeros(1)) and torch.equal(back["a"]["b"], torch.ones(1))


@pytest.mark.parametrize("value", [object(), {1, 2}, {(1, 2): 3}, b"bytes"], ids=lambda value: type(value).__name__)
def test_state_that_is_neither_tensor_nor_json_is_refused_with_its_place(value):
    with pytest.raises(DataError, match="state/agent/0"):
        flatten_state({"agent": [value]})
