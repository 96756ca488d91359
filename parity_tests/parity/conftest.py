"""The bridge's tests look at what is said of two networks, in float64."""

import pytest


@pytest.fixture(autouse=True)
def programs(quickly_compiled):
    """Compiled quickly; a file that looks at float32's rounding has another fixture of this name."""
