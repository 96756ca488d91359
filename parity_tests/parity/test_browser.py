"""The HTML report in a browser, where there is one: see `parity_tests/browser.py`."""

import pytest

from parity_tests import browser


@pytest.mark.thorough
@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "all is here")
def test_nothing_is_wrong_with_any_page():
    assert browser.look_at_all() == []
