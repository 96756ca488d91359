"""The page that `make published` writes, of rows that are made up: neither transformers nor a framework is needed."""

import json
import subprocess
import sys

import pytest

from parity_tests.published.__main__ import main, misses, page
from parity_tests.published.pairs import PAIRS, merged


def said(*codes, ok=None, text="said"):
    return {"ok": not codes if ok is None else ok, "codes": list(codes), "said": text, "notes": [], "cpu_s": 3.4}


def rows(**changes):
    """Every pair as it should be, but for changes {name: {part: ...}}."""
    return [
        {
            "name": name,
            "versions": {"transformers": "4.57.3", "jax": "1"},
            "arguments": ["position_ids"] if pair.flax_inputs else [],
            "eval": said(),
            "train": said(*pair.differs),
            "weights": {"equal": 7, "of": 7, "said": ""},
            "planted": said(pair.code),
            "gb": 1.25,
            **changes.get(name, {}),
        }
        for name, pair in PAIRS.items()
    ]


def test_what_is_as_it_should_be():
    text = page(rows())
    assert misses(rows()) == []
    assert "(0):\n\nNone." in text
    assert "with transformers 4.57.3, jax 1." in text
    assert (
        "| BERT | BertModel, FlaxBertModel | `flax_inputs`: position_ids | 7 of 7 | ok | ok | "
        "layer_norm_eps=0.001: `epsilon` | 3 | 1.2 |" in text
    )
    assert "| 7 of 7 | ok | `unbiased-variance` | hidden_act=silu: `activation` |" in text
    assert "text_config: hidden_act=gelu: `activation`" in text


@pytest.mark.parametrize(
    ("part", "found", "cell", "miss"),
    [
        ("eval", said("unexplained", text="differs | there"), "`unexplained`", "BERT, eval: differs \\| there"),
        ("train", said(ok=False, text="raises ValueError"), "not ok", "BERT, train: raises ValueError"),
        ("weights", {"equal": 6, "of": 7, "said": "a/kernel"}, "6 of 7", "BERT, weights: a/kernel"),
        ("planted", said(), "**not found**", "BERT, planted: said"),
        ("planted", said("activation"), "`activation` (`epsilon` is right)", "BERT, planted: said"),
        ("planted", said("epsilon", "pool-kind"), "`epsilon`, `pool-kind`", "BERT, planted: `pool-kind` is named"),
    ],
)
def test_what_is_not_is_told(part, found, cell, miss):
    text = page(rows(BERT={part: found}))
    (row,) = (line for line in text.splitlines() if line.startswith("| BERT"))
    assert cell in row
    assert "as it should be (1):" in text
    assert f"- {miss}" in text


def test_what_differs_truly_must_be_found_and_nothing_else():
    assert misses(rows(ResNet={"train": said()}))
    assert misses(rows(ResNet={"train": said("unbiased-variance", "activation")}))


def test_the_page_needs_every_pair(tmp_path, monkeypatch, capsys):
    import parity_tests.published.__main__ as program

    made = {row["name"]: row for row in rows()}
    monkeypatch.setattr(program, "in_a_process", made.__getitem__)
    kept, written = tmp_path / "rows.json", tmp_path / "page.md"
    with pytest.raises(SystemExit):
        main(["--pairs", "BERT", "--rows", str(kept), "--write", str(written)])
    assert "there is none for RoBERTa" in capsys.readouterr().err
    assert not written.exists()
    main(["--pairs", *list(PAIRS)[1:], "--rows", str(kept), "--write", str(written)])
    assert [row["name"] for row in json.loads(kept.read_text())] == list(PAIRS)
    assert written.read_text() == page(rows())


def test_pairs_are_data():
    """Nothing but numpy is imported for them; a mistake is an entry of a configuration, nested or not."""
    frameworks = "torch", "jax", "flax", "transformers"
    code = f"import sys, parity_tests.published.pairs; print([m for m in {frameworks} if m in sys.modules])"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[]"
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}
    assert all(pair.mistake and pair.code for pair in PAIRS.values())
