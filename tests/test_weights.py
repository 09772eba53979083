"""Weights that are wrong in one way each, and what is said of them."""

import json
import pickle
import random
import shutil

import pytest
import safetensors.torch
import torch

import latentmill
from latentmill import weights
from latentmill.errors import RunError

GOOD = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor([1, 2])}


def file_of(path, header, data=bytes(24)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2, 3), at=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at)}


def test_good_weights_come_back_and_dtypes_may_differ(tmp_path):
    safetensors.torch.save_file(GOOD, tmp_path / "w.safetensors")
    expected = {name: torch.empty(tensor.shape, device="meta") for name, tensor in GOOD.items()}
    found = weights.load(tmp_path / "w.safetensors", expected)
    assert found.keys() == GOOD.keys() and all(torch.equal(found[name], GOOD[name]) for name in GOOD)
    narrow = {"a": torch.ones(3).to(torch.float8_e4m3fn)}
    safetensors.torch.save_file(narrow, tmp_path / "w.safetensors")
    assert weights.load(tmp_path / "w.safetensors")["a"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), "a is in its header twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}', "dtype is in its header twice"),
        (b'{"a":', "its header is no JSON"),
        (b'{"\xff":1}', "its header is no JSON"),
        (b'{"a":' * 100_000, "its header is no JSON"),
        ({"a": entry(at=(0, 99))}, "no safetensors file that can be read: "),
        ({"a": entry(at=(0, 12)), "b": entry(at=(0, 12))}, "no safetensors file that can be read: "),
        ({"a": entry(shape=(9, 9))}, "no safetensors file that can be read: "),
        ({"a": entry("F99")}, "no safetensors file that can be read: "),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, header, reason):
    with pytest.raises(ValueError, match=rf"w\.safetensors: .*{reason}") as error:
        weights.load(file_of(tmp_path / "w.safetensors", header))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [10**9, 2**63, 200])
def test_an_oversized_header_is_refused_unread(tmp_path, length):
    (tmp_path / "w.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a"' + bytes(50))
    with pytest.raises(ValueError, match=f"its header would have {length} bytes"):
        weights.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [b"", b"short", b"GGUF" + bytes(100)])
def test_what_is_something_else_is_refused(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="w.safetensors: no safetensors file"):
        weights.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_a_number_that_is_not_finite_is_found(tmp_path, number, dtype):
    wrong = torch.zeros(3, 3)
    wrong[1, 2] = number
    safetensors.torch.save_file({**GOOD, "c": wrong.to(dtype)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="c is not finite"):
        weights.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"a": torch.empty(3, 2)}, r"a is of shape \(2, 3\), and \(3, 2\) was expected"),
        ({"c": torch.empty(1), "d": torch.empty(1)}, "tensors that are missing: c, d"),
        ({f"c{i}": torch.empty(1) for i in range(9)}, "tensors that are missing: c0, c1, c2 and 6 more"),
    ],
)
def test_what_was_expected_and_what_was_found_is_said(tmp_path, change, reason):
    safetensors.torch.save_file(GOOD, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=reason):
        weights.load(tmp_path / "w.safetensors", {**GOOD, **change})
    with pytest.raises(ValueError, match="tensors that are unknown: b, n"):
        weights.load(tmp_path / "w.safetensors", {"a": GOOD["a"]})


class Evil:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_unless_allowed_and_then_hold_weights_alone(tmp_path, zipped):
    def save(content):
        torch.save(content, tmp_path / "w.ckpt", _use_new_zipfile_serialization=zipped)

    for content in (GOOD, {"state_dict": GOOD, "epoch": 3}):
        save(content)
        with pytest.raises(ValueError, match="a pickle, which may run code when it is read: convert it to safetensors"):
            weights.load(tmp_path / "w.ckpt")
        found = weights.load(tmp_path / "w.ckpt", GOOD, allow_pickle=True)
        assert all(torch.equal(found[name], GOOD[name]) for name in GOOD)
    save({"a": 1})
    with pytest.raises(ValueError, match="holds no tensors by name"):
        weights.load(tmp_path / "w.ckpt", allow_pickle=True)
    save({"a": Evil(tmp_path / "owned")})
    for allowed in (False, True):
        with pytest.raises(ValueError, match="a pickle") as error:
            weights.load(tmp_path / "w.ckpt", allow_pickle=allowed)
        assert "\n" not in str(error.value)
    (tmp_path / "w.ckpt").write_bytes(pickle.dumps(Evil(tmp_path / "owned"), protocol=2))
    with pytest.raises(ValueError, match="a pickle of more than weights"):
        weights.load(tmp_path / "w.ckpt", allow_pickle=True)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("save", [safetensors.torch.save_file, torch.save])
def test_whatever_is_wrong_with_a_file_it_is_weights_or_one_line(tmp_path, save):
    path = tmp_path / "w"
    save(GOOD, path)
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(chance.choice([len(content), 200]))] = chance.randrange(256)
        path.write_bytes(content)
        try:
            weights.load(path, allow_pickle=True)
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


def test_a_pickle_by_another_name_is_a_pickle(tmp_path):
    torch.save(GOOD, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="w.safetensors: a pickle"):
        weights.load(tmp_path / "w.safetensors")


def test_a_job_with_damaged_weights_makes_nothing_and_names_the_tensor(tmp_path, monkeypatch):
    from latentmill_shapes import plugin

    shutil.copytree(plugin.WEIGHTS, tmp_path, dirs_exist_ok=True)
    tensors = safetensors.torch.load_file(tmp_path / "text_encoder.safetensors")
    name = min(tensors)
    tensors[name].flatten()[0] = float("nan")
    safetensors.torch.save_file(tensors, tmp_path / "text_encoder.safetensors", plugin.metadata("text_encoder"))
    monkeypatch.setattr(plugin, "WEIGHTS", tmp_path)
    with pytest.raises(RunError, match=f"{tmp_path}/text_encoder.safetensors: {name} is not finite"):
        latentmill.run("txt2img", ["cluster=inline", f"output={tmp_path / 'out'}"])
    assert not list((tmp_path / "out" / "data").glob("*"))
