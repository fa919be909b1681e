"""Seeds as they are written in settings."""

from __future__ import annotations

import pytest

from rlhf_env.errors import ConfigError
from rlhf_env.training.config import parse_seeds


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [3]), ("0-4", [0, 1, 2, 3, 4]), ("0,2,5", [0, 2, 5]), ("7, 1-2", [7, 1, 2]), ("4-4", [4])]
)
def test_seeds_are_read(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not understood: write 0-4, or 0,1,2"),
        ("0,", "not understood"),
        ("-1", "not understood"),
        ("1.5", "not understood"),
        ("4-2", "4-2 names no seed"),
        ("1,4-2", "4-2 names no seed"),
        ("0-2,1", "names a seed twice"),
    ],
)
def test_seeds_that_are_none_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_seeds(text)
