"""docs/gallery.md is made from what stands now, has every code, and is where a card of the report leads."""

import re

from parity.diagnosis.mistakes import TABLE
from parity.report.cards import PAGE, link
from parity_tests.pages import ROOT, slugs
from parity_tests.parity import gallery


def test_the_page_is_made_from_what_stands_now():
    assert (ROOT / PAGE).read_text() == gallery.text()


def test_a_heading_for_each_code():
    page = (ROOT / PAGE).read_text()
    assert re.findall(r"^### `(.*)`$", page, re.MULTILINE) == [mistake.code for mistake in TABLE]
    for mistake in TABLE:
        assert link(mistake.code).endswith(f"{PAGE}#{mistake.code}")
        assert mistake.code in slugs(page)


def test_each_is_recognised_in_some_way_and_reports_are_of_codes():
    codes = [mistake.code for mistake in TABLE]
    firsts = [codes.index(group.first) for group in gallery.GROUPS]
    assert firsts == sorted(firsts)
    assert firsts[0] == 0
    assert set(gallery.REPORTS) <= set(codes)
    for repository, thread, about in gallery.REPORTS.values():
        assert re.fullmatch(r"[\w-]+/[\w.-]+", repository)
        assert re.fullmatch(r"(issues|pull)/\d+", thread)
        assert about
