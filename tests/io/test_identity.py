from typing import Any

import pytest

from clipdistill.io.identity import first_difference


@pytest.mark.parametrize(
    ("then", "now", "part"),
    [
        ({"a": 1}, {"a": 1, "new": None}, None),
        ({"a": {"old": None}}, {"a": {"new": None}}, None),
        ([{"a": 1}], [{"a": 1, "new": None}], None),
        ({"a": 1}, {"a": 1, "new": 0}, "new"),
        ({"a": {"old": False}}, {"a": {}}, "a.old"),
        ({"a": 1}, {"a": None}, "a"),
        ({"a": [1, None]}, {"a": [1]}, "a"),
    ],
)
def test_an_empty_setting_may_be_absent(then: Any, now: Any, part: str | None) -> None:
    found = first_difference(then, now)
    assert (found and found.part) == part
