"""What a report says, in the terminal, as JSON and as HTML, and the pytest helper."""

import dataclasses
import html.parser
import io
import json
import math
import re
import sys
from datetime import UTC, datetime
from functools import partial

import flax.linen as linen
import numpy as np
import pytest
import torch
from rich.console import Console

import parity
from parity import testing
from parity.diagnosis.kind_fixes import fix_of
from parity.report import NETWORK, Diagnosis, Divergence, LayerRow, Report, both_names, number
from parity.report.cards import answer
from parity.report.findings import together
from parity.report.html import page
from parity.report.html.modules import tree

EVIDENCE = "PyTorch adds 1e-5 to the variance, Flax 1e-3: <b>fitted</b> & [bold]sure[/bold] to 2e-15"


def example():
    """A batch norm that differs, a layer that inherits the error, and errors that are no finite numbers."""
    rows = [
        LayerRow("forward", "conv.0", "Conv_0", "conv", "output", 0.0, 1e-10, 1e-7, 3e-7, 0.0),
        LayerRow("forward", "conv.1", "BatchNorm_0", "batch_norm", "output", 4e-4, 1e-10, 4e-4, None, 4e-4),
        LayerRow("forward", "fc[3].<0>", "Dense_0", "linear", "output", 2e-4, 1e-10, None, None, 1e-15),
        LayerRow(
            "backward", "conv.1", "BatchNorm_0", "batch_norm", "input gradient", math.inf, 1e-9, None, None, math.nan
        ),
        LayerRow("statistics", "conv.1", "BatchNorm_0", "batch_norm", "running_var", math.nan, 1e-10),
        LayerRow("loss", "", "", "", "value", 1e-16, 1e-10),
    ]
    return Report(
        Divergence("forward", "conv.1", "BatchNorm_0", 4e-4, 1e-10, "output"),
        [Diagnosis("epsilon", "conv.1", EVIDENCE, "BatchNorm_0")],
        rows,
        ["dropout was switched off on both sides"],
        {
            "mode": "train",
            "loss": np.float64(math.nan),
            "array": np.array([1.0, math.inf]),
            "losses": {"PyTorch": [2.0, 1.0, 0.5], "Flax": np.array([2.0, math.nan, 0.5])},
            "distances": {"parameters": [0.0, 1e-12, math.inf]},
        },
    )


def test_ok():
    """No divergence and no diagnosis; notes and rows do not count."""
    assert Report(notes=["a note"], layers=example().layers).ok
    assert not example().ok
    assert not Report(diagnoses=[Diagnosis("epsilon", "", "")]).ok
    assert not Report(Divergence("forward", "", "", 1.0, 0.0)).ok


def test_verdicts():
    report = example()
    expected = ["ok", "differs first", "inherits", "differs", "differs", "ok"]
    assert [report.verdict(row) for row in report.layers] == expected
    assert not report.layers[4].ok  # NaN is within no bound
    beyond = LayerRow("forward", "1", "a", "linear", "output", 1e-3, 1e-10, explained="rounding")
    assert Report(layers=[beyond]).verdict(beyond) == "rounding"
    within = dataclasses.replace(beyond, error=0.0, explained="cut otherwise")
    assert Report(layers=[within]).verdict(within) == "ok"


def test_text():
    """Every name and number, the evidence in one line, the summary last; and no escape sequences."""
    text = str(example())
    assert "\x1b" not in text
    for part in ("conv.0", "BatchNorm_0", "fc[3].<0>", "input gradient", "4.0e-04", "inf", "nan", NETWORK, "rounding"):
        assert part in example().table(rows="all")
    assert f"epsilon at conv.1 (BatchNorm_0): {EVIDENCE}" in text.splitlines()
    assert "note: dropout was switched off on both sides" in text.splitlines()
    first = "differs first in forward at conv.1 (BatchNorm_0): output error 4.0e-04, bound 1.0e-10: epsilon"
    assert text.splitlines()[-1] == first
    assert len(re.findall("differs first$", text, re.MULTILINE)) == 1


def test_summaries():
    rows = example().layers
    assert Report(layers=rows[:1]).summary == "ok: 1 layer, 1 quantity agrees"
    assert Report(layers=[*rows[:2], rows[5]]).summary == "ok: 2 layers, 2 quantities agree"
    assert str(Report()) == "ok: 0 layers, 0 quantities agree"
    unseen = Report(diagnoses=[Diagnosis("weight-decay-coupling", "", "...")])
    assert unseen.summary == "no layer differs by more than its bound, but: weight-decay-coupling"
    twice = Report(Divergence("loss", "", "", 1.0, 1e-10), [Diagnosis("loss-reduction", "", "")] * 2)
    assert twice.summary == f"differs first in loss at {NETWORK}: error 1.0e+00, bound 1.0e-10: loss-reduction"
    two = Report(diagnoses=[Diagnosis("unbiased-variance", "1", "..."), Diagnosis("momentum-inverted", "6", "...")])
    assert two.summary.endswith("but: unbiased-variance at 1, momentum-inverted at 6"), "not both in the first's layer"
    assert both_names("a.0", "a.0") == both_names("a.0", "") == "a.0"
    assert [number(v) for v in (None, 0.0, 0.00312, math.inf)] == ["", "0", "3.1e-03", "inf"]


@pytest.mark.parametrize("width", [20, 40, 75, 76, 80, 100, 200])
def test_any_width(width):
    """Nothing is cut off, and no line is longer than the terminal is wide."""
    file = io.StringIO()
    Console(file=file, width=width).print(example())
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in file.getvalue()
    letters = re.sub(r"\s", "", file.getvalue())
    for part in ("4.0e-04", "1.0e-10", "inf", "fc[3].<0>"):
        assert part in letters


def test_colours_in_a_terminal():
    file = io.StringIO()
    Console(file=file, width=120, force_terminal=True, color_system="standard").print(example())
    assert "\x1b[1;31m" in file.getvalue()


def test_ascii_terminal(monkeypatch):
    """No line of the table that it can't show."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert str(example()).isascii()


def test_json(tmp_path):
    """Strict JSON: infinity and NaN are words."""
    path = tmp_path / "report.json"
    example().to_json(path)

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read["ok"] is False
    assert read["first_divergence"]["torch_layer"] == "conv.1"
    assert read["diagnoses"][0] == {
        "code": "epsilon",
        "layer": "conv.1",
        "evidence": EVIDENCE,
        "flax_layer": "BatchNorm_0",
        "places": [
            {
                "torch_layer": "conv.1",
                "flax_layer": "BatchNorm_0",
                "class_name": "",
                "before": "",
                "text": "at conv.1 (BatchNorm_0)",
            }
        ],
        "values": None,
    }
    assert read["answer"] == "The two differ by one mistake: epsilon in one layer, at conv.1 (BatchNorm_0)."
    assert [row["ok"] for row in read["layers"]] == [True, False, False, False, False, True]
    assert read["layers"][3]["error"] == "inf"
    assert read["layers"][3]["local_error"] == "nan"
    assert read["layers"][3]["error32"] is None
    assert read["details"]["loss"] == "nan"
    assert read["details"]["array"] == [1.0, "inf"]
    assert [f.name for f in tmp_path.iterdir()] == ["report.json"]


def test_what_is_no_json():
    """Anything in the details becomes something that JSON knows."""
    details = {
        1: (np.int64(1), {2.0}),
        "dtype": np.dtype("float32"),
        "none": None,
        "row": example().layers[0],
        "b": True,
    }
    made = Report(details=details).to_dict()["details"]
    json.dumps(made, allow_nan=False)
    assert made["1"] == [1, [2.0]]
    assert made["dtype"] == "float32"
    assert made["row"]["quantity"] == "output"
    assert made["b"] is True


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("before")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    for write in (example().to_json, example().to_html):
        with pytest.raises(OSError, match="no space"):
            write(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order, and keeps what there is."""

    VOID = ("meta", "input", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html(tmp_path):
    path = tmp_path / "report.html"
    example().to_html(path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    # Nothing from outside: what it shows and runs is in it, and a reader's click alone leads away.
    assert not {"link", "img", "iframe", "object", "base", "form"} & set(tags)
    loading = [(tag, k) for tag, attrs in page.tags for k in attrs if k in ("src", "srcset", "action", "data", "style")]
    assert not loading
    assert not [attrs["href"] for tag, attrs in page.tags if tag == "use" and not attrs["href"].startswith("#")]
    assert "url(" not in text
    assert "@import" not in text
    # What the report holds, escaped.
    assert EVIDENCE in page.text
    assert not [attrs for tag, attrs in page.tags if tag == "fitted"]
    assert "<b>fitted" not in text
    assert "fc[3].<0>" in page.text
    assert "prefers-color-scheme: dark" in text
    assert ("html", {"lang": "en"}) in page.tags
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    charts = [attrs for tag, attrs in page.tags if tag == "svg" and "role" in attrs]
    assert len(charts) == 4  # forward, across and down, losses, distances; other phases have fewer than three points
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    coordinates = [v for tag, attrs in page.tags for k, v in attrs.items() if k in ("d", "cx", "cy", "x", "y")]
    assert not [v for v in coordinates if v and re.search("nan|inf", v)]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len({*ids})
    assert {attrs["href"][1:] for _, attrs in page.tags if attrs.get("href", "").startswith("#")} <= {*ids}


def test_html_begins_with_the_answer():
    """Then the cause, then what differs with the first difference marked; every row is there, folded."""
    report = example()
    text = page(report, datetime(2026, 1, 2, 3, 4, tzinfo=UTC))
    found = Page(text)
    parts = ["<h1>", 'id="causes"', 'id="differs"', 'id="errors"', 'id="modules"', 'id="all"']
    assert sorted(parts, key=text.index) == parts
    assert answer(report) in found.text
    assert "2026-01-02 03:04 UTC" in found.text
    assert text.count('<tr class="differs-first">') == 2  # among what differs, and among all
    every = text[text.index('id="all"') :]
    assert every.count("<tr class=") == len(report.layers)
    # One code of a fix in both frameworks, unfolded, for the kind of layer that it is in.
    assert all(line in found.text for side in fix_of("epsilon", "batch_norm") for line in side)
    assert '<details class="fix" open>' in text


def test_html_is_short():
    """A network of 400 layers: less than 2.5 kB a layer, and a chart with as many points as can be told apart."""
    rows = [LayerRow("forward", f"blocks.{i}.fc", f"blocks/{i}/fc", "linear", "output", 0.0, 1e-10) for i in range(400)]
    text = page(Report(layers=rows))
    assert len(text) < 2500 * len(rows)
    assert 100 < text.count("<title>blocks.") <= 240


def test_modules_are_a_tree():
    rows = [LayerRow("forward", f"net.blocks.{i}.fc", f"b/{i}", "linear", "output", 10.0**-i, 1e-2) for i in range(4)]
    found = tree(Report(layers=rows))
    (blocks,) = found.modules.values()
    assert blocks.name == "net.blocks"  # a module with nothing but another is one with it
    assert list(blocks.modules) == ["0.fc", "1.fc", "2.fc", "3.fc"]
    assert blocks.count() == 4
    deep = LayerRow("forward", ".".join("a" * 5000), "", "", "output", 0.0, 1e-10)
    Page(page(Report(layers=[deep])))


def unfolded(text):
    """Which modules of the tree are open, by the names that the filter looks at."""
    tree = text[text.index('id="modules"') : text.index('id="all"')]
    return [name.split()[0] for name in re.findall(r'data-name="([^"]*)"><details open>', tree)]


def test_html_of_a_depth():
    """A table of the modules in place of what differs; the tree is unfolded so far, and counts what differs."""
    rows = [
        LayerRow("forward", f"net.{i}.{name}", f"{name}_{i}", "linear", "output", float(i == 1), 1e-2)
        for i in range(3)
        for name in ("a", "b")
    ]
    rows += [LayerRow("forward", "head", "head", "linear", "output", 0.0, 1e-2)]
    report = Report(Divergence("forward", "net.1.a", "a_1", 1.0, 1e-2, "output"), [], rows)
    text = page(report)
    assert "2 of 6 layers differ" in text
    assert "2 of 2 layers differ" in text
    assert unfolded(text) == ["net", "net.1"]
    report.depth = 2
    text = page(report)
    assert unfolded(text) == ["net"]
    section = text[text.index('id="differs"') : text.index('id="errors"')]
    cells = [
        re.findall("<td[^>]*>(?:<svg.*?</svg>)?(.*?)</td>", line) for line in re.findall("<tr class.*?</tr>", section)
    ]
    assert [line[1] for line in cells] == ["net.0", "net.1", "net.2", "head"]
    assert cells[1] == [" differs first", "net.1", "forward output of a", "2", "2", "1.0e+00", "1.0e-02"]
    assert text[text.index('id="all"') :].count("<tr class=") == len(rows)
    report.depth = 1
    assert unfolded(page(report)) == []


@pytest.mark.parametrize("report", [Report(), Report(layers=[LayerRow("forward", "", "", "", "output", 0.0, 0.0)])])
def test_html_of_little(report, tmp_path):
    report.to_html(tmp_path / "report.html")
    assert report.summary in Page((tmp_path / "report.html").read_text()).text


def test_html_of_curves_that_are_none(tmp_path):
    """Details of these names may hold something else."""
    Report(details={"losses": {"a": "text", "b": []}, "distances": 3}).to_html(tmp_path / "report.html")
    assert "chart" not in (tmp_path / "report.html").read_text().split("</style>")[1]


def contrast(a, b):
    """Of two colours "#rrggbb", as WCAG 2.1 counts it."""
    lights = []
    for colour in (a, b):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        lights.append(0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_contrast():
    """Text and marks in light and in dark, on the page and on the boxes."""
    from parity.report.html.page import STYLE

    light, dark = STYLE.split("@media", 1)
    for style in (light, dark.split("* {")[0]):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", style))
        for name in ("front", "soft", "good", "bad", "warn", "s0", "s1", "s2", "s3"):
            assert contrast(colours[name], colours["back"]) >= 4.5
            assert contrast(colours[name], colours["box"]) >= 4.5


def fake_check(monkeypatch, report):
    """`parity.check` that gives this report; returns what it was called with."""
    calls = []

    def check(*args, **options):
        calls.append((args, options))
        return report

    monkeypatch.setattr(sys.modules["parity.check"], "check", check)
    return calls


def test_assert_parity_passes(monkeypatch):
    report, x, y = Report(), np.zeros(2), np.ones(3)
    calls = fake_check(monkeypatch, report)
    assert testing.assert_parity("a", "b", x) is report
    testing.assert_parity("a", "b", [x, y], train=False)
    testing.assert_parity("a", "b", x, y)
    assert [args for args, _ in calls] == [("a", "b", x), ("a", "b", x, y), ("a", "b", x, y)]
    assert [options for _, options in calls] == [{}, {"train": False}, {}]


def test_assert_parity_fails(monkeypatch):
    """The message holds the code, the layer, the evidence, where they differ first, and the table."""
    report = example()
    fake_check(monkeypatch, report)
    with pytest.raises(AssertionError) as caught:
        testing.assert_parity("a", "b", np.zeros(2))
    message = str(caught.value)
    assert f"epsilon at conv.1 (BatchNorm_0): {EVIDENCE}" in message
    assert report.summary in message
    assert str(report) in message
    assert "__tracebackhide__" in testing.assert_parity.__code__.co_varnames


def test_the_same_mistake_in_several_layers_is_one_diagnosis(tmp_path):
    """In the table, as JSON and as HTML: with the list of the layers, not once for each."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(*(part for _ in range(4) for part in (torch.nn.Linear(5, 5), torch.nn.LayerNorm(5))))

    class Wrong(linen.Module):
        @linen.compact
        def __call__(self, x):
            for _ in range(4):
                x = linen.LayerNorm(epsilon=1e-3)(linen.Dense(5)(x))
            return x

    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    report = parity.check(module, Wrong(), x)
    (diagnosis,) = report.diagnoses
    assert (diagnosis.code, diagnosis.layers) == ("epsilon", ["1", "3", "5", "7"])
    where = "1 (LayerNorm_0), 3 (LayerNorm_1), 5 (LayerNorm_2), 7 (LayerNorm_3)"
    assert f"epsilon at {where}: epsilon is 1e-05 in PyTorch, 0.001 in Flax" in str(report)
    assert report.summary.endswith("epsilon at 1 and 3 more layers")
    report.to_html(tmp_path / "report.html")
    assert all(f"<li>{place}</li>" in (tmp_path / "report.html").read_text() for place in where.split(", "))
    (told,) = report.to_dict()["diagnoses"]
    assert (told["layer"], told["layers"]) == ("1", diagnosis.layers)


def test_one_convention_over_shares_of_different_sizes():
    """Of 32 values a channel, then of 8: another factor, and the same mistake."""
    torch.manual_seed(0)
    norms = torch.nn.BatchNorm2d(2), torch.nn.AvgPool2d(2), torch.nn.BatchNorm2d(2)

    class Right(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            norm = partial(linen.BatchNorm, use_running_average=not train, momentum=0.9)
            return norm()(linen.avg_pool(norm()(x), (2, 2), (2, 2)))

    x = np.random.default_rng(0).normal(size=(2, 2, 4, 4)).astype(np.float32)
    (diagnosis,) = parity.check(torch.nn.Sequential(*norms), Right(), x).diagnoses
    assert (diagnosis.code, diagnosis.layers) == ("unbiased-variance", ["0", "2"])


def test_two_sentences_are_two_diagnoses():
    given = [Diagnosis("epsilon", "1", "a"), Diagnosis("epsilon", "2", "b"), Diagnosis("epsilon", "3", "a", "C")]
    first, second = together(given)
    assert (first.layers, first.more, second.layers) == (["1", "3"], (("3", "C"),), ["2"])
    assert Report(diagnoses=[first, second]).summary.endswith("epsilon at 1 and 1 more layer, epsilon at 2")
