"""The cost model of many accelerators, on figures that are made up."""

import json

import pytest

from benchmarks import scaling
from benchmarks.accelerators.__main__ import KEY, programs


@pytest.fixture
def figures(tmp_path):
    """Of all programs, as `python -m benchmarks.accelerators --json` writes them."""
    counted = {"cycles": 1, "fusions": 1, "float64": 0, "seconds": 1.0, "bytes": 1.0, "temp": 1, "sent": 10**8}
    rows = [
        row | counted | {"traffic": 10**10, "collectives": 107 * (row["devices"] > 1), "flops": 7.7e11}
        for row in programs("")
    ]
    path = tmp_path / "figures.json"
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_a_step(figures):
    """By hand: 10 GB by 3.35 TB/s; the ring's 7 / 4 of 102 MB by 450 GB/s and 20 us; 107 messages of 20 us."""
    at = {tuple(row[key] for key in KEY): row for row in json.loads(figures.read_text())["rows"]}
    one, eight = (scaling.step(machine, at) for machine in scaling.MACHINES[:2])
    assert one["seconds"] == one["memory"] == pytest.approx(1e10 / 3.35e12)
    assert one["arithmetic"] == pytest.approx(2 * 3 * 4.09e9 * 32 / 989e12)
    assert eight["gradients"] == pytest.approx(1.75 * 4 * 25_557_032 / 450e9 + 20e-6)
    assert eight["statistics"] == pytest.approx(107 * 20e-6)
    assert eight["seconds"] == pytest.approx(one["seconds"] + eight["gradients"] + eight["statistics"])
    assert eight["images"] == pytest.approx(256 / eight["seconds"])
    least = scaling.least_images(scaling.MACHINES[1], at)
    assert scaling.step(scaling.MACHINES[1], at, least["least"])["share"] <= scaling.SHARE
    assert scaling.step(scaling.MACHINES[1], at, least["least"] // 2)["share"] > scaling.SHARE


def test_the_page(figures, tmp_path, capsys):
    page = tmp_path / "page.md"
    scaling.main(["--figures", str(figures), "--write", str(page)])
    text = page.read_text()
    assert "operations over 4 x H100 |" in text
    assert "v5e-256" in text
    assert str(tmp_path) not in text
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"{}", b'{"rows": []}', b"[1]"])
def test_other_figures_are_refused(content, tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        scaling.main(["--figures", str(path)])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "allowed: " in err
