"""The report in the terminal: the answer first, a card a cause, and of the table what differs."""

import dataclasses
import json
import re

import flax.linen as linen
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import parity
from parity.comparison.values import Values
from parity.diagnosis.mistakes import FIRST_OF, MISTAKES, codes_of
from parity.report import NETWORK, Diagnosis, Divergence, LayerRow, Report
from parity.report.cards import answer, cards, link
from parity.report.findings import Place, shown
from parity.report.folded import folded


def rows(count, wrong=(), name="block.{}"):
    """A row a layer; those of `wrong` differ by themselves, and what is behind the first inherits its error."""
    first = min(wrong, default=count)
    return [
        LayerRow(
            "forward", name.format(i), f"Dense_{i}", "linear", "output", 1e-3 if i >= first else 0.0, 1e-10,
            local_error=1e-3 if i in wrong else 0.0,
        )
        for i in range(count)
    ]  # fmt: skip


def differing(count, wrong, name="block.{}"):
    places = tuple(Place(name.format(i), f"Dense_{i}", "Linear") for i in wrong)
    first, *others = [place[:2] for place in places]
    values = Values("forward", "output", first[0], 0.25, 0.5, (1, 2), (2, 1), (4, 3), (4, 3))
    found = Diagnosis("kernel-transposed", first[0], "not transposed", first[1], tuple(others), places, values)
    return Report(Divergence("forward", *first, 1e-3, 1e-10, "output"), [found], rows(count, wrong, name))


def table(text):
    """The rows of the table in a report's text."""
    return [
        line for line in text.splitlines() if re.match(r"(forward|backward|statistics|loss|optimizer|\.\.)( |$)", line)
    ]


def test_a_pair_that_agrees_is_one_line():
    report = Report(layers=rows(130), notes=["dropout was switched off"])
    assert str(report).splitlines() == ["note: dropout was switched off", "ok: 130 layers, 130 quantities agree"]
    assert len(table(report.table(rows="all"))) == 130


def test_only_what_differs_and_three_rows_around_the_first():
    report = differing(40, [10, 20, 30])
    told = table(str(report))
    names = [line.split()[1] if line != ".." else ".." for line in told]
    around = [f"block.{i}" for i in range(7, 14)]
    assert names == [*around, "..", "block.20", "..", "block.30"]
    assert [line.split()[-2:] for line in told if "first" in line] == [["differs", "first"]]
    assert "block.10 " in next(line for line in told if "first" in line)
    assert 'not shown: 7 ok, 24 that inherit (rows="all", --rows all)' in str(report).splitlines()
    assert len(table(report.table(rows="all"))) == 40
    assert "not shown" not in report.table(rows="all")


def test_a_mistake_everywhere_is_short():
    """Of 300 layers that differ, some rows and names, and how many there are; all of them on request and as JSON."""
    report = differing(300, range(300))
    text = str(report)
    assert len(text.splitlines()) < 45
    assert "and 294 more: not transposed" in text
    assert "300 Linear" in text
    assert "not shown: 284 that differ" in text
    assert len(table(report.table(rows="all"))) == 300
    assert "block.299 (Dense_299): not" in report.table(rows="all")
    assert len(report.to_dict()["diagnoses"][0]["places"]) == 300


def by_modules(depth=None):
    """The layers of a network with an encoder and a head of its own; and a layer that Flax alone has."""
    names = ["encoder.0.fc", "encoder.0.norm", "encoder.1.fc", "encoder.1.norm", "head"]
    errors, alone = [0.0, 2e-10, 3e-10, 5e-10, 4e-10], [0.0, 2e-10, 0.0, 5e-10, 0.0]
    layers = [
        LayerRow("forward", name, f"Dense_{i}", "linear", "output", errors[i], 1e-10, local_error=alone[i])
        for i, name in enumerate(names)
    ]
    layers += [dataclasses.replace(row, phase="backward", quantity="weight gradient") for row in layers[1:2]]
    layers += [LayerRow("forward", "", "extra/Dense_5", "linear", "output", 1e-11, 1e-10)]
    layers += [LayerRow("forward", "", "", "", "output", 4e-10, 1e-10, local_error=0.0)]
    first = Divergence("forward", "encoder.0.norm", "Dense_1", 2e-10, 1e-10, "output")
    return Report(first, [Diagnosis("epsilon", "encoder.0.norm", "...", "Dense_1")], layers, depth=depth)


def folds(report):
    return [(m.name, m.layers, m.differ, m.worst.error, m.verdict) for m in folded(report, report.depth)]


def test_modules_of_a_depth():
    """Each with its worst error, by the verdict first, and how many layers differ: two rows of a layer are one."""
    others = [("extra", 1, 0, 1e-11, "ok"), (NETWORK, 0, 0, 4e-10, "inherits")]
    head = ("head", 1, 0, 4e-10, "inherits")
    assert folds(by_modules(1)) == [("encoder", 4, 2, 2e-10, "differs first"), head, *others]
    encoder = [("encoder.0", 2, 1, 2e-10, "differs first"), ("encoder.1", 2, 1, 5e-10, "differs")]
    assert folds(by_modules(2)) == [*encoder, head, ("extra/Dense_5", *others[0][1:]), others[1]]
    assert len(folds(by_modules(99))) == 7
    verdicts = {row.torch_layer: by_modules().verdict(row) for row in by_modules().layers[:5]}
    assert all(m[-1] == verdicts[m[0]] for m in folds(by_modules(3)) if m[0] in verdicts)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_table_of_modules(width):
    """In place of the rows that differ; the rest of what is told is the same."""
    report = by_modules()
    text, whole = report.table(depth=1, width=width), report.table(width=width)
    told = [line.split() for line in text.splitlines() if re.match(r"(encoder|head|extra|\(network\))\b|\(net", line)]
    if width < 80:
        assert "encoder: 2 of 4 layers differ; worst" in text
        assert "(network): worst error 4.0e-10, bound" in text
    else:
        told_first = "encoder forward output of 0.norm 4 2 2.0e-10 1.0e-10 differs first"
        assert told[0] == told_first.split()
        assert told[-1] == ["(network)", "forward", "output", "4.0e-10", "1.0e-10", "inherits"]
        assert len(told) == 4
    assert max(map(len, text.splitlines())) <= max(width, len(report.summary))
    assert text.splitlines()[:5] == whole.splitlines()[:5]
    assert text.splitlines()[-1] == whole.splitlines()[-1] == report.summary
    assert str(by_modules(1)) == report.table(depth=1)
    assert by_modules(1).to_dict() == report.to_dict()


def test_the_modules_of_a_pair_that_agrees_are_shown_on_request():
    report = Report(layers=rows(4))
    assert report.table(depth=1).splitlines()[2].split()[:6] == ["block", "forward", "output", "of", "0", "4"]
    assert report.table(depth=1).splitlines()[-1] == str(report) == report.summary


@pytest.mark.parametrize("depth", [0, -1, 1.5, "2", True])
def test_depths(depth):
    said = re.escape(f"depth is {depth!r}; allowed: an integer >= 1, or None")
    with pytest.raises(ValueError, match=said):
        Report(depth=depth)
    with pytest.raises(ValueError, match=said):
        Report().table(depth=depth)


def test_rows_are_one_of_two():
    with pytest.raises(ValueError, match="rows is 'some'; allowed: 'differing' or 'all'"):
        Report().table(rows="some")


def test_a_card():
    """Where, the two numbers with their places, what to write in both frameworks, and where more stands."""
    lines = str(differing(4, [1])).splitlines()
    start = lines.index("kernel-transposed at block.1 (Dense_1): not transposed")
    card = lines[start + 1 : lines.index("", start)]
    assert card == [
        "  numbers  output of block.1 at [2, 1]: 0.25 in PyTorch, 0.5 in Flax at [1, 2]",
        "  write    for example:",
        "  PyTorch: linear.weight.copy_(kernel.T)",
        "    not    linear.weight.copy_(kernel)",
        '  Flax:    kernel = state["weight"].T',
        '    not    kernel = state["weight"]',
        f"  see      {link('kernel-transposed')}",
    ]
    assert link("kernel-transposed").endswith("docs/gallery.md#kernel-transposed")
    assert link("unexplained") == ""


def test_answers():
    """What, where, and in how many layers."""
    assert answer(differing(3, [1])) == (
        "The two differ by one mistake: kernel-transposed in one layer, at block.1 (Dense_1)."
    )
    assert answer(differing(3, [1, 2])) == (
        "The two differ by one mistake: kernel-transposed in 2 layers, first at block.1 (Dense_1)."
    )
    between = Diagnosis("activation", "2", "", "Dense_0", places=(Place("2", "Dense_0", "GELU", "5"),))
    last = Diagnosis("softmax-axis", "7", "", "Dense_1", places=(Place("7", "Dense_1", "Softmax", NETWORK),))
    assert answer(Report(diagnoses=[between, last])) == (
        "The two differ by 2 mistakes: activation in one place, in front of 5 (Dense_0), at 2 (GELU); "
        "softmax-axis in one place, in front of the output, at 7 (Softmax)."
    )
    rule = Diagnosis("nesterov", "", "")
    assert answer(Report(diagnoses=[rule])) == "The two differ by one mistake: nesterov in all layers."
    unknown = Report(diagnoses=[Diagnosis("unexplained", "a", "...", "b")])
    assert answer(unknown) == "The two differ in one layer, at a (b), by no mistake that is known."
    stopped = Report(diagnoses=[Diagnosis("could-not-run", "a", "Flax could not run: E")])
    assert answer(stopped) == "The two could not be compared to the end: Flax could not run: E."
    assert answer(Report()) == "The two agree: nothing differs by more than rounding explains."


def test_a_convention_is_said_to_be_one():
    """To predict: ok, where nothing but what training keeps differs; not where an output does."""
    kept = LayerRow("statistics", "1", "BatchNorm_0", "batch_norm", "running_var", 1e-3, 1e-10)
    fine, wrong = rows(2), rows(2, [1])
    known = Diagnosis("unbiased-variance", "1", "...", "BatchNorm_0")
    report = Report(Divergence("statistics", "1", "BatchNorm_0", 1e-3, 1e-10, "running_var"), [known], [*fine, kept])
    assert not report.ok
    where = "unbiased-variance in one layer, at 1 (BatchNorm_0)."
    convention = "in training the two differ by a convention of the frameworks"
    assert answer(report) == f"To predict: ok; {convention}, {where}"
    assert "no mistake of the port (to predict: ok)" in str(report)
    other = Diagnosis("epsilon", "0", "...")
    besides = Report(report.first_divergence, [other, known], [*wrong, kept])
    assert "to predict" not in str(besides).lower()
    assert answer(besides).startswith("The two differ by one mistake: epsilon in one layer, at 0; and by a convention")
    unseen = dataclasses.replace(besides, diagnoses=[known])
    assert "to predict" not in str(unseen).lower()
    assert answer(unseen) == f"The two differ by a convention of the frameworks: {where}"


@pytest.mark.parametrize("width", [80, 100, 120])
def test_long_names_fit(width):
    """The table is not wider than the terminal: names lose their middle, and have it in JSON."""
    name = "encoder.layers.{}.self_attention.output_projection"
    text = differing(12, [5], name=name).table(width=width)
    told = table(text)
    assert len(told) == 7
    assert all(len(line) <= width for line in told)
    assert all("…" in line for line in told) == (width < 120)
    assert all(f".{i}." in line for i, line in enumerate(told, 2)), "the number stays"
    assert sum(line.endswith(" differs first") for line in told) == 1
    assert name.format(5) in json.dumps(differing(12, [5], name=name).to_dict())


def test_no_control_characters(tmp_path):
    """A name can neither colour nor clear the terminal, nor turn the direction of the text, nor end a line."""
    bad = "a\x1b[2Jb\u202ec\nd\x07\x9b1m\ud800"
    row = LayerRow("forward", bad, bad, bad, bad, 1.0, 1e-10)
    place = Place(bad, bad, bad, bad)
    values = Values("forward", bad, bad, 1.0, 2.0, (0,), (0,), (1,), (1,))
    found = [
        Diagnosis("epsilon", bad, bad, bad, ((bad, bad),), (place, Place(bad, bad)), values),
        Diagnosis("unexplained", bad, bad),
        Diagnosis("could-not-run", bad, bad),
    ]
    for some in (found, found[1:2], found[2:]):
        first = Divergence("forward", bad, bad, 1.0, 1e-10, bad)
        report = Report(first, some, [row], [bad], {bad: bad, "torch_module": bad})
        for width in (40, 80, 120):
            text = report.table(width=width)
            assert all(line.isprintable() for line in text.splitlines())
            assert "\\x1b[2J" in re.sub(r"\s", "", text)
        report.to_json(tmp_path / "r.json")
        assert (tmp_path / "r.json").read_text().replace("\n", "").isprintable()
        report.to_html(tmp_path / "r.html")
        assert (tmp_path / "r.html").read_text().replace("\n", "").isprintable()
    assert shown("grün 層") == "grün 層"


class Net(linen.Module):
    exact: bool = False

    @linen.compact
    def __call__(self, x):
        x = linen.gelu(linen.Dense(6)(x), approximate=not self.exact)
        return linen.Dense(2)(x)


def test_a_fault_between_two_layers():
    """In front of the layer behind, at the module that does it; its row is marked, and the numbers are those there."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    report = parity.check(module, Net(), x)
    first, (found,) = report.first_divergence, report.diagnoses
    assert (first.torch_layer, first.flax_layer, first.before, first.class_name) == ("1", "Dense_1", "2", "GELU")
    where = "in front of 2 (Dense_1), at 1 (GELU)"
    assert report.summary.startswith(f"differs first in forward {where}: input error ")
    assert answer(report) == f"The two differ by one mistake: activation in one place, {where}."
    marked = [row for row in report.layers if report.verdict(row) == "differs first"]
    assert [(row.phase, row.torch_layer, row.quantity) for row in marked] == [("forward", "2", "input")]
    u = module[0](torch.from_numpy(x)).double().detach()
    exact, tanh = (nn.functional.gelu(u, approximate=how).numpy() for how in ("none", "tanh"))
    v = found.values
    assert (v.phase, v.quantity, v.torch_layer) == ("forward", "input", "2")
    assert v.flax_index == v.torch_index == np.unravel_index(np.abs(exact - tanh).argmax(), exact.shape)
    assert v.torch == pytest.approx(exact[v.torch_index], rel=1e-6)
    assert v.flax == pytest.approx(tanh[v.flax_index], rel=1e-6)
    assert parity.check(module, Net(exact=True), x).ok


def test_the_numbers_stand_where_each_framework_has_them():
    """Images: channels on axis 1 in PyTorch, last in Flax."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5, eps=1e-2))

    class Flax(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.Conv(5, (3, 3), padding="VALID")(x)
            return linen.BatchNorm(use_running_average=not train, momentum=0.9)(x)

    x = np.random.default_rng(0).normal(size=(3, 2, 6, 7)).astype(np.float32)
    (found,) = parity.check(module, Flax(), x, train=False).diagnoses
    n, c, h, w = found.values.torch_index
    assert found.values.flax_index == (n, h, w, c)
    with torch.no_grad():
        assert found.values.torch == pytest.approx(float(module.eval()(torch.from_numpy(x))[n, c, h, w]), rel=1e-5)


class Strided(linen.Module):
    """Two convolutions, the second with a stride that the other side has not."""

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(4, (3, 3))(x)
        return linen.Conv(5, (3, 3), strides=2, padding=1)(x)


def test_another_shape_is_said_as_it_is_on_either_side(tmp_path):
    """In the summary, the card, the table, the page and as JSON; in PyTorch's order too, where that is another one."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1))
    report = parity.check(network, Strided(), np.random.default_rng(0).normal(size=(2, 3, 6, 8)).astype(np.float32))
    told = "another shape: [2, 5, 6, 8] in PyTorch, [2, 3, 4, 5] in Flax (in PyTorch's order [2, 5, 3, 4])"
    text = report.table(rows="all")
    assert report.summary == f"differs first in forward at 1 (Conv_1): output {told}: stride"
    assert f"  numbers  output of 1: {told}" in text.splitlines()
    assert f"forward 1 (Conv_1) output: {told}: differs first" in report.table(width=70)
    assert " inf " not in text
    row = next(line.split() for line in table(text) if line.split()[-1] == "first")
    assert row[:6] == ["forward", "1", "Conv_1", "output", "shape", "1.0e-10"]
    shapes = {"torch": [2, 5, 6, 8], "flax": [2, 3, 4, 5], "flax_in_torch": [2, 5, 3, 4], "text": told}
    read = json.loads(json.dumps(report.to_dict()))
    assert next(r["shapes"] for r in read["layers"] if r["shapes"]) == shapes
    assert read["first_divergence"]["shapes"] == read["diagnoses"][0]["values"]["shapes"] == shapes
    report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text().replace("&#x27;", "'")
    assert f"output, {told}" in page
    assert "<td>[2, 3, 4, 5] (in PyTorch's order [2, 5, 3, 4])</td>" in page


class Shaken(linen.Module):
    """Two layers, and something of no name between them, or behind the second's product."""

    between: bool

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(8)(x)
        x = jnp.tan(0.2 * jnp.cumsum(x, -1)) if self.between else jnp.cumsum(x, -1)
        kernel = self.param("kernel", linen.initializers.normal(), (8, 4))
        return (x if self.between else jnp.sinh(x)) @ kernel


class TorchShaken(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.b(self.a(x).cumsum(-1))


def test_what_is_not_explained_has_a_subject(tmp_path):
    """Which layer, what differs and by how much; what was looked for in vain, and what to do next."""
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    report = parity.check(TorchShaken(), Shaken(True), x)
    (found,) = report.diagnoses
    assert found.code == "unexplained"
    assert re.match(r"the output of \(network\)|the (in|out)put of \S.* differs by \d\.\de[+-]\d\d: .*", found.evidence)
    (card,) = cards(report)
    tried = card.tried.split(", ")
    assert set(tried) <= {*MISTAKES} or card.tried == "no mistake of such a layer is known"
    text = str(report).splitlines()
    assert f"  tried    {card.tried}" in text
    assert f"  next     {card.further}" in text
    assert card.further.startswith(
        ("if b is another layer in Flax, give layer_map={'b': ...}; else check ", "parity.dump")
    )
    report.to_html(tmp_path / "page.html")
    assert "Tried: " in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("place", "kind", "among"),
    [
        (Place("1", "Dense_1"), "linear", "kernel-transposed"),
        (Place("1", "LayerNorm_0"), "layer_norm", "epsilon"),
        (Place("1", "Dense_1", before="1"), "linear", "activation"),
    ],
)
def test_what_was_tried_is_of_the_place(place, kind, among):
    row = LayerRow("forward", "1", place.flax_layer, kind, "output", 1.0, 1e-10)
    found = Diagnosis("unexplained", "1", "...", place.flax_layer, places=(place,))
    (card,) = cards(Report(Divergence("forward", "1", place.flax_layer, 1.0, 1e-10), [found], [row]))
    assert among in card.tried.split(", ")
    assert len(card.tried.split(", ")) < len(MISTAKES) / 2


def test_each_mistake_is_of_one_family():
    assert [code for family in FIRST_OF for code in codes_of(family)] == [*MISTAKES][1:]
