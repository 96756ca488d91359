"""What the package says of itself leads somewhere, and the versions that it is tried with are those declared."""

import importlib.util
import re
import sys
import types
import zipfile

import pytest

from parity_tests.package import PROJECT, ROOT, missing
from parity_tests.versions import TESTS, lowest

README = (ROOT / "README.md").read_text()


@pytest.fixture
def described(monkeypatch):
    """hatch_build.py's, without hatchling, which only builds need."""
    interface = types.SimpleNamespace(MetadataHookInterface=object)
    monkeypatch.setitem(sys.modules, "hatchling.metadata.plugin.interface", interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.described


def links(page):
    return re.findall(r"\]\(([^)]*)\)", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL))


def test_the_description_without_an_address(described):
    page = described(README)
    assert links(page)
    assert all(link.startswith("https://") for link in links(page))
    assert "![" not in page
    assert "[" not in page.partition("Of the mistakes")[2].partition("\n\n")[0]
    code = re.findall(r"^```.*?^```$", README, flags=re.MULTILINE | re.DOTALL)
    assert code == re.findall(r"^```.*?^```$", page, flags=re.MULTILINE | re.DOTALL)


def test_the_description_with_an_address(described):
    page = described("![a](docs/a.png) [b](docs/b.md#c) [d](#e) [f](https://g)\n", "https://host/owner/name/")
    assert links(page) == [
        "https://host/owner/name/raw/main/docs/a.png",
        "https://host/owner/name/blob/main/docs/b.md#c",
        "https://host/owner/name/blob/main/README.md#e",
        "https://g",
    ]
    assert len(links(described(README, "https://host/owner/name"))) == len(links(README))


def test_the_address_is_the_same_everywhere():
    """Once pyproject.toml has it, the README installs from it; until then it says what is to be put there."""
    urls = PROJECT.get("urls", {})
    address = next((urls[name] for name in ("Source", "Repository", "Homepage") if name in urls), None)
    assert re.findall(r"git\+([^'\s]+)", README) == [address or "URL"]


def test_the_lowest_set_is_the_declared_one():
    assert lowest(["jax>=0.10", "ml_dtypes>=0.5", "torch>=2.6", "jax[tpu]"]) == [
        "jax==0.10",
        "ml_dtypes==0.5",
        "torch==2.6",
    ]
    assert lowest(["torch>=2.6"], "2.13.0") == ["torch==2.13.0"]
    assert len(lowest(PROJECT["dependencies"])) == len(PROJECT["dependencies"])
    assert all((ROOT / test).is_file() for test in TESTS)


def test_a_wheel_that_lacks_something_is_seen(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as file:
        file.writestr("parity/__init__.py", "")
        file.writestr("tests/__init__.py.txt", "")
        file.writestr("a-1.dist-info/METADATA", "Name: a\n\n[limits](docs/limits.md)\n")
    wrong = missing(tmp_path / "a.whl")
    for said in (
        "parity/report/html/page.css is not in the wheel",
        "a-1.dist-info/licenses/LICENSE is not in the wheel",
        "tests/__init__.py.txt is in the wheel",
        "the description's link docs/limits.md leads nowhere",
        "the description is not there",
    ):
        assert said in wrong
