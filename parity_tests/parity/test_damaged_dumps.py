"""Damaged and made-up dumps: `compare` says in one line what is wrong, with exit status 2, and allocates nothing."""

import copy
import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy
import torch

from parity import offline
from parity.__main__ import main
from parity.diagnosis.optimizer.family import findings
from parity.records import dump_file, schema
from parity.records.answers import Answers
from parity.records.array_files import read_safetensors
from parity_tests import damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(JSON, arrays) of a dump with everything in it."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    path = tmp_path_factory.mktemp("dump") / "a"
    offline.dump(module, [x], path, optimizer=lambda p: torch.optim.SGD(p, 0.1), steps=1)
    arrays, about = dump_file.files_of(path)
    return json.loads(about.read_bytes()), safetensors.numpy.load_file(arrays)


def write(path, about, arrays, *, summed=True):
    """Both files, with the digests of what is in them."""
    content = arrays if isinstance(arrays, bytes) else safetensors.numpy.save(arrays)
    if summed:
        about["sha256"] = hashlib.sha256(content).hexdigest()
        about["checksum"] = dump_file.checksum(about)
    path.with_name("a.safetensors").write_bytes(content)
    path.with_name("a.json").write_text(about if isinstance(about, str) else json.dumps(about))


def said(path, capsys):
    """What `compare` says of it: one line, exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(path), str(path)])
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert told.startswith("python -m parity compare: ")
    assert told.count("\n") == 1
    assert told.removesuffix("\n").isprintable()
    assert "allowed: " in told
    return told


def put(*place, value):
    """A damage: this value at that place of the JSON."""

    def change(about, arrays):
        for part in place[:-1]:
            about = about[part]
        about[place[-1]] = value

    return change


def drop(*place):
    def change(about, arrays):
        for part in place[:-1]:
            about = about[part]
        del about[place[-1]]

    return change


def array(name, value, new=None):
    """A damage: value(array) in the array's place, or under a new name; None: no such array."""

    def change(about, arrays):
        made = value(arrays[name])
        if new is None:
            del arrays[name]
        if made is not None:
            arrays[new or name] = made

    return change


def swap(a, b):
    def change(about, arrays):
        arrays[a], arrays[b] = arrays[b], arrays[a]

    return change


def same(a):
    return a


FIRST, RUN = ("layers", 0), ("runs", "free")
DAMAGES = {
    "a field is gone": (drop("layers"), "layers is missing"),
    "a field of a layer": (drop(*FIRST, "kind"), "layers[0].kind is missing"),
    "a field of a run": (drop(*RUN, "calls"), "runs.free.calls is missing"),
    "the free run": (drop(*RUN), "runs.free is missing"),
    "an unknown field": (put("cheksum", value="x"), "cheksum is not known"),
    "an unknown run": (put("runs", "fourth", value={}), "runs.fourth is not known"),
    "framework": (put("framework", value="keras"), "framework is 'keras'"),
    "framework is a list": (put("framework", value=["torch"]), "framework is ['torch']"),
    "version": (put("version", value=2), "is no parity dump of version 1"),
    "version is true": (put("version", value=True), "version is True"),
    "layers is null": (put("layers", value=None), "layers is None"),
    "layers is an object": (put("layers", value={}), "layers is {}"),
    "a layer is a number": (put(*FIRST, value=3), "layers[0] is 3"),
    "kind": (put(*FIRST, "kind", value="lin\near"), r"layers[0].kind is 'lin\near'"),
    "tensors is a list": (put(*FIRST, "tensors", value=[]), "layers[0].tensors is []"),
    "a tensor of no array": (put(*FIRST, "tensors", "weight", value="2.weight"), "layers[0].tensors.weight is '2.wei"),
    "a statistic of no tensor": (put(*FIRST, "statistics", value=["x"]), "layers[0].statistics[0] is 'x'"),
    "config is nested": (put(*FIRST, "config", value={"a": [{}]}), "layers[0].config.a[0] is {}"),
    "a stride of 0": (put(*FIRST, "config", value={"stride": [1, 0]}), "layers[0].config.stride[1] is 0"),
    "half a surrogate": (put(*FIRST, "path", value="\ud800"), r"layers[0].path is '\ud800'"),
    "half a surrogate as a name": (put(*FIRST, "config", value={"\ud800": 1}), "a name in layers[0].config is"),
    "two layers of one path": (put("layers", 1, "path", value="0"), "layers[1] is of the same path"),
    "a call of no layer": (put(*RUN, "calls", 0, "path", value="7"), "runs.free.calls[0].path is '7'"),
    "a call twice": (put(*RUN, "calls", 1, value={"path": "0", "index": 0}), "runs.free.calls[1] is of the same"),
    "an index below 0": (put(*RUN, "calls", 0, "index", value=-1), "runs.free.calls[0].index is -1"),
    "an index of 1.5": (put(*RUN, "calls", 0, "index", value=1.5), "runs.free.calls[0].index is 1.5"),
    "loss": (put(*RUN, "loss", value="much"), "runs.free.loss is 'much'"),
    "a loss beyond floats": (put(*RUN, "loss", value=10**400), "runs.free.loss is 1000"),
    "failed_in": (put(*RUN, "failed_in", value=["forward"]), "runs.free.failed_in is ['forward']"),
    "dropouts": (put(*RUN, "dropouts", value=[[0.5]]), "runs.free.dropouts[0] is [0.5]"),
    "output_names": (put(*RUN, "output_names", value=["a", "b"]), "runs.free.output_names are 2; allowed: 1"),
    "glue": (put(*RUN, "glue", 0, "position", value=None), "runs.free.glue[0].position is None"),
    "noise": (put("noise", value=[["forward", "0", 0]]), "noise[0] is ['forward', '0', 0]"),
    "a phase": (put("noise", 0, 0, value="sideward"), "noise[0][0] is 'sideward'"),
    "notes": (put("notes", value="none"), "notes is 'none'"),
    "details": (put("details", value=[]), "details is []"),
    "mode": (put("details", "mode", value="test"), "details.mode is 'test'"),
    "no loss said": (drop("details", "loss"), "details.loss is missing"),
    "no version said": (drop("details", "torch"), "details.torch is missing"),
    "a digest of an input": (put("details", "inputs", 0, "sha256", value="0"), "details.inputs[0].sha256 is '0'"),
    "an answer of no array": (put("answers", "7", value=None), 'answers."7" has no gradients'),
    "input/900000000": (array("free/input/0", same, "free/input/900000000"), "is 'free/input/900000000'"),
    "a call's input": (array("free/call/0/input/0", same, "free/call/0/input/900000000"), "input/900000000'"),
    "a gradient's number": (array("free/input/0", same, "free/input_gradient/900000000"), "gradient/900000000'"),
    "a call's number": (array("free/input/0", same, "free/call/900000000/output"), "is 'free/call/900000000/output'"),
    "a state's number": (array("state/1/0.bias", same, "state/900000000/0.bias"), "its states are 0, 1, 900000000"),
    "a number twice": (array("free/input/0", same, "free/input/00"), "is 'free/input/00'"),
    "a number in other digits": (array("free/input/0", same, "free/input/\u0663"), r"is 'free/input/\u0663'"),
    "an unknown array": (array("free/input/0", same, "free/inputs/0"), "is 'free/inputs/0'"),
    "a control character": (array("free/input/0", same, "\x1b[31m\n"), r"is '\x1b[31m\n'"),
    "an output is gone": (array("free/call/0/output", lambda a: None), "runs.free.calls[0] has no output"),
    "a tensor is gone": (array("free/tensor/0.weight", lambda a: None), "layers[0].tensors.weight is '0.weight'"),
    "a statistic is gone": (array("free/new_statistic/1.running_var", lambda a: None), "1.running_var is missing"),
    "a state is not whole": (array("state/1/0.weight", lambda a: None), "'0.weight' is not in every state"),
    "a gradient's shape": (array("free/gradient/0.weight", np.ravel), "free/gradient/0.weight is (12,)"),
    "two tensors changed": (swap("free/gradient/0.weight", "free/gradient/0.bias"), "free/gradient/0.bias is (4, 3)"),
    "whole numbers": (array("free/gradient/0.weight", lambda a: a.astype(int)), "free/gradient/0.weight is 'int64'"),
    "an answer's shape": (array("answer/0.weight/updates", lambda a: a[0]), 'answer."0.weight"/gradients is (6,'),
    "questions out of order": (array("answer/0.weight/asked", lambda a: a[::-1].copy()), "asked is not ascending"),
    "complex numbers": (array("free/output/0", same, "free/output/0 complex"), "allowed: floats [..., 2], once"),
}


@pytest.mark.parametrize(("change", "words"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_wrong_is_named(change, words, whole, tmp_path, capsys):
    """Made up with the right digests, so that nothing but the field itself tells."""
    about, arrays = copy.deepcopy(whole[0]), dict(whole[1])
    change(about, arrays)
    write(tmp_path / "a", about, arrays)
    assert words in said(tmp_path / "a", capsys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a.json: "),
        ("[]", "is no parity dump"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": "parity dump", "version": 1, "version": 1}', "'version' is in it twice"),
        ('{"format": "parity dump", "version": NaN}', "NaN is no number"),
        ('{"format": "parity dump", "version": 1e999}', "1e999 is beyond"),
        ('{"format": "parity dump", "version": ' + "1" * 5000 + "}", "Exceeds the limit"),
        ('{"format": "parity dump", "version": 1}', "sha256 is missing"),
    ],
)
def test_text_that_is_no_dump(text, words, whole, tmp_path, capsys):
    write(tmp_path / "a", text, whole[1], summed=False)
    assert words in said(tmp_path / "a", capsys)


def test_files_of_safetensors(whole, tmp_path, capsys):
    """A header that promises a shape of 2**60, one that is cut, and another dump's file."""
    content = safetensors.numpy.save(whole[1])
    for damaged in (content[:-1], content[:100], b"", content.replace(b"[5,3]", b"[5,1152921504606846976]", 1)):
        write(tmp_path / "a", copy.deepcopy(whole[0]), damaged)
        assert "a.safetensors: " in said(tmp_path / "a", capsys)
        with pytest.raises(ValueError, match=r"^\S"):
            read_safetensors(damaged)
    write(tmp_path / "a", whole[0], safetensors.numpy.save({"free/input/0": np.ones(3)}), summed=False)
    assert "is not the file that" in said(tmp_path / "a", capsys)


def test_the_checksum(whole, tmp_path, capsys):
    """Whatever changes what the JSON says is seen, and what does not is let through."""
    about = copy.deepcopy(whole[0])
    write(tmp_path / "a", about, whole[1])
    dump_file.load_whole(tmp_path / "a")
    text, rng = (tmp_path / "a.json").read_text(), np.random.default_rng(0)
    for at in rng.integers(len(text), size=300):
        damaged = bytearray(text.encode())
        damaged[at] ^= 1 << int(rng.integers(7))
        (tmp_path / "a.json").write_bytes(damaged)
        if damage.tried(lambda: dump_file.load_whole(tmp_path / "a"), len(damaged)) is None:
            assert json.loads(damaged) == about
    # A number that fits the schema.
    changed = copy.deepcopy(about)
    changed["runs"]["free"]["loss"] += 1e-9
    write(tmp_path / "a", changed, whole[1], summed=False)
    assert "it was changed since it was written" in said(tmp_path / "a", capsys)
    # Indented otherwise and sorted it is the same; older dumps have none.
    (tmp_path / "a.json").write_text(json.dumps(about, indent=7, sort_keys=True))
    assert dump_file.load_whole(tmp_path / "a").free.loss == about["runs"]["free"]["loss"]
    del changed["checksum"]
    write(tmp_path / "a", changed, whole[1], summed=False)
    assert dump_file.load_whole(tmp_path / "a").free.loss == changed["runs"]["free"]["loss"]


def test_every_kind_of_damage(whole, tmp_path):
    """Of both files; the digest of the arrays is put right, so that what is behind it is read."""
    write(tmp_path / "a", copy.deepcopy(whole[0]), whole[1])
    files = dump_file.files_of(tmp_path / "a")
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents, strict=True):
        for damaged in damage.every_kind(content, np.random.default_rng(2), 120):
            for other, as_it_was in zip(files, contents, strict=True):
                other.write_bytes(as_it_was)
            if file.suffix == ".safetensors":
                write(tmp_path / "a", copy.deepcopy(whole[0]), damaged)
            else:
                file.write_bytes(damaged)
            size = len(damaged) + len(contents[0])
            assert damage.tried(lambda: dump_file.load_whole(tmp_path / "a"), size) != ""


def test_weights_of_a_damaged_dump(whole, tmp_path):
    """It is not taken for a file of weights."""
    write(tmp_path / "a", copy.deepcopy(whole[0]), whole[1])
    for text in ((tmp_path / "a.json").read_text()[:-3], '{"format": "parity dump"' + "[" * 100_000):
        (tmp_path / "a.json").write_text(text)
        assert dump_file.is_dump(tmp_path / "a")
        with pytest.raises(ValueError, match=r"a\.json: "):
            offline.dump(torch.nn.Linear(3, 4), [np.ones((2, 3), np.float32)], tmp_path / "b", weights=tmp_path / "a")
    (tmp_path / "a.json").write_text('{"hidden_size": 3}')  # beside model.safetensors, as others have it
    assert not dump_file.is_dump(tmp_path / "a.safetensors")


def test_names_in_messages():
    assert schema.below("a", "b c\n") == 'a."b c\\n"'
    with pytest.raises(ValueError, match=r"^a is \[{7}\.\.\.\]{7}; allowed: text$"):
        schema.text([[[[[[[[[[]]]]]]]]]], "a")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
def test_an_optimizer_that_gives_no_numbers(value, whole):
    """As Adam does without an epsilon: it is told, and nothing is fitted to it."""
    answer = dump_file.Response(
        *(whole[1][f"answer/0.weight/{name}"] for name in ("gradients", "parameters", "updates"))
    )
    wrong = answer._replace(updates=np.where(answer.gradients > 1, value, answer.updates))
    (found,) = findings([Answers("0.weight", answer, wrong, np.inf)])
    assert (found.code, found.evidence[:36]) == ("unexplained", "Flax's optimiser makes NaN, infinity")
