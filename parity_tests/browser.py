"""Reports in a browser: axe-core's rules, overflow, without script, in light and dark; and the pictures of docs/.

    python -m parity_tests.browser                     every page is looked at; the exit status is 1 where one is wrong
    python -m parity_tests.browser --pictures docs     and two are kept, report.png and report_phone.png

Needs Playwright (the extra `browser`), Chromium (the system's, else Playwright's own) and axe-core, which
`make browser` installs below node_modules/.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import nnx

import parity

AXE = Path(__file__).parents[1] / "node_modules" / "axe-core" / "axe.min.js"
DESKTOP, PHONE = 1280, 390
SCHEMES = ("light", "dark")
SERIOUS = ("serious", "critical")
PICTURES = {"report.png": ("two mistakes", DESKTOP), "report_phone.png": ("two mistakes", PHONE)}
TALL = 1000
"""Pixels of a picture's height, of the page's first."""


def networks(layers: int, *, norm: float = 1e-5, gelu: Callable[..., Any] | None = None) -> tuple[Any, Any]:
    """A chain of linear layers, norms and GELU, and the same in NNX with that epsilon and activation."""
    torch.manual_seed(0)
    parts: list[torch.nn.Module] = []
    flax_parts: list[Any] = []
    rngs = nnx.Rngs(0)
    for _ in range(layers):
        parts += [torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.GELU()]
        flax_parts += [nnx.Linear(8, 8, rngs=rngs), nnx.LayerNorm(8, epsilon=norm, rngs=rngs)]
        flax_parts.append(gelu or partial(nnx.gelu, approximate=False))
    return torch.nn.Sequential(*parts), nnx.Sequential(*flax_parts)


def raising(x: Any) -> Any:
    """An activation that can't be computed in float64, where the two are compared."""
    if x.dtype == np.float64:
        raise ValueError("no <such> activation & no other")
    return nnx.gelu(x)


def pages() -> Iterator[tuple[str, Callable[[], parity.Report]]]:
    """(name, what makes the report) of each page."""
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    cases = {
        "two mistakes": networks(1, norm=1e-6, gelu=nnx.gelu),
        "one epsilon of many layers": networks(14, norm=1e-6),
        "ok": networks(2),
        "raised": networks(2, gelu=raising),
    }
    for name, pair in cases.items():
        yield name, partial(parity.check, *pair, x)


def missing() -> str:
    """What is not installed; "" if nothing is."""
    if importlib.util.find_spec("playwright") is None:
        return "Playwright is not installed (make browser)"
    return "" if AXE.is_file() else f"{AXE.parent.name} is not in node_modules/ (make browser)"


def look(
    browser: Any, page: Path, width: int, scheme: str, *, script: bool = True, picture: Path | None = None
) -> list[str]:
    """What is wrong with a page: serious findings of axe-core, overflow, requests, nothing to read."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
    )
    try:
        tab, wrong = context.new_page(), []
        tab.on(
            "request", lambda request: wrong.append(f"asks for {request.url}") if request.url != page.as_uri() else None
        )
        tab.on("pageerror", lambda error: wrong.append(f"script: {error}"))
        tab.goto(page.as_uri())
        if picture is not None:
            height = min(TALL, tab.evaluate("document.documentElement.scrollHeight"))
            tab.screenshot(path=picture, clip={"x": 0, "y": 0, "width": width, "height": height}, full_page=True)
        if not tab.locator("h1").inner_text().strip():
            wrong.append("no answer")
        if script:
            if tab.evaluate("document.documentElement.scrollWidth > innerWidth"):
                wrong.append("wider than the window")
            tab.evaluate(AXE.read_text())
            found = tab.evaluate("axe.run()")["violations"]
            wrong += [f"{rule['id']}: {rule['help']}" for rule in found if rule["impact"] in SERIOUS]
    finally:
        context.close()
    return [f"{page.stem}, {width} px, {scheme}{'' if script else ', no script'}: {text}" for text in wrong]


def look_at_all(pictures: Path | None = None) -> list[str]:
    """What is wrong with any page, on either width, in either scheme, with script and without."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    wrong = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        # Without a sandbox, which a container does not allow; the pages are ours.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, report in pages():
            page = Path(folder) / f"{name}.html"
            report().to_html(page)
            for width in (DESKTOP, PHONE):
                kept = [file for file, of in PICTURES.items() if of == (name, width)]
                for scheme in SCHEMES:
                    picture = pictures / kept[0] if pictures is not None and kept and scheme == "light" else None
                    wrong += look(browser, page, width, scheme, picture=picture)
                wrong += look(browser, page, width, "light", script=False)
        browser.close()
    return wrong


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests.browser", description="Reports in a browser.")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures of docs/")
    pictures = parser.parse_args().pictures
    if missing() or (pictures is not None and not pictures.is_dir()):
        parser.error(missing() or f"--pictures is {pictures}; allowed: a folder")
    wrong = look_at_all(pictures)
    print("\n".join(wrong) or "nothing is wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
