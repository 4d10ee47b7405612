"""Classes are matched by name; what does not match is refused in one line that lists both sides."""

import random
from decimal import Decimal

import numpy as np
import pytest

from clipdistill.errors import InputError
from clipdistill.models.class_matching import ClassLabels, in_class_order, match_classes, match_through
from clipdistill.models.prompts import load_prompts, shipped_prompt_sets


def match(names, known, **options):
    return list(match_classes(names, known, of="data d", to="prompts p", **options))


@pytest.mark.parametrize("name", shipped_prompt_sets())
def test_shipped_classes_are_found_in_any_order_and_as_folder_names(name):
    """Shuffled, and spelt as folders are: the class of each is that of the name it was made from."""
    known = load_prompts(name).classnames
    order = random.Random(0).sample(range(len(known)), len(known))
    spelt = [known[index].replace(" ", "_").replace("/", "-").title() for index in order]
    for names in ([known[index] for index in order], spelt):
        assert match(names, known) == order
    assert match(spelt[: len(spelt) // 2 + 1], known) == order[: len(spelt) // 2 + 1]


@pytest.mark.parametrize(
    ("names", "known", "expected"),
    [
        (["apple", "zebra"], ["zebra", "apple"], [1, 0]),
        (["map_pin"], ["pin", "map pin"], [1]),
        (["F-A 18", "Ｃａｆé ", "STRASSE"], ["café", "straße", "F/A-18"], [2, 0, 1]),
        (["e\u0301clair", "up\u2010down"], ["up-down", "\u00e9clair"], [1, 0]),
        (["crane", "Crane"], ["Crane", "crane"], [1, 0]),
        (["Crane"], ["Crane", "crane"], [0]),
        (["-", "_"], ["_", "-"], [1, 0]),
        (["missile", "owl", "missile"], ["missile", "owl", "missile"], [0, 1, 2]),
        (["0", "2", "10"], [f"class {n}" for n in range(11)], [0, 2, 10]),
        (["007", "1.0"], [f"class {n}" for n in range(8)], [7, 1]),
        (["1", "2"], ["0", "1", "2"], [1, 2]),
        (["1", "2"], ["2", "1"], [1, 0]),
        ([], ["a"], []),
    ],
)
def test_names_alike(names, known, expected):
    assert match(names, known) == expected


@pytest.mark.parametrize(
    ("names", "known", "message"),
    [
        (
            ["mappin", "apple"],
            ["map pin", "apple"],
            r"data d: 1 of its 2 classes are not in prompts p: 'mappin'; of prompts p, 1 are not in it: 'map pin'; .*"
            r"or --labels-by-order: both lists in one order$",
        ),
        (["apple", "kiwi"], ["apple"], r"1 of its 2 .*: 'kiwi'; allowed: .*\(--labels-by-order needs .*: 2 and 1\)$"),
        (
            [f"n{n:08}" for n in range(9)],
            list("abcdefghi"),
            r"9 of its 9 .*: 'n00000000', .* and 6 more; .* and 6 more",
        ),
        (
            ["CRANE"],
            ["Crane", "crane"],
            r"1 of its 1 classes are not in prompts p: 'CRANE' \('CRANE': more than one there\)",
        ),
        (["map_pin", "map pin"], ["map pin"], r"'map_pin' and 'map pin' are both 'map pin' of prompts p"),
        (["missile", "owl"], ["missile", "missile", "owl"], r"1 of its 2 classes .*: 'missile'"),
        (["1", "2"], ["a", "b"], r"data d: class number 2; allowed: 0 to 1, the classes of prompts p, or --labels-by"),
        (["1", "01"], ["a", "b"], r"'1' and '01' are both 'b'"),
        (["0", "1"], ["1", "2"], r"1 of its 2 classes are not in prompts p: '0'"),
        (["0", "-1"], ["a", "b"], r"2 of its 2 classes are not in prompts p: '0', '-1'"),
        (["x" * 1000, "a\nb"], ["a", "b"], r"x{57}\.\.\.', 'a\\nb'; "),
    ],
)
def test_strangers_are_refused_with_the_list(names, known, message):
    with pytest.raises(InputError, match=message) as caught:
        match(names, known)
    assert "\n" not in str(caught.value)


def test_by_order_is_said_where_names_differ(caplog):
    assert match(["1", "2"], ["daisy", "rose"], by_order=True) == [0, 1]
    assert caplog.messages == ["data d: labels by order, not by name: in prompts p '1' is 'daisy', '2' is 'rose'"]
    caplog.clear()
    assert match(["Daisy", "rose"], ["daisy", "rose"], by_order=True) == [0, 1]
    assert caplog.messages == []
    with pytest.raises(InputError, match=r"data d: 1 classes; allowed with data\.x=true: 2, as in prompts p"):
        match(["a"], ["a", "b"], by_order=True, flag="data.x=true")


def test_numbers_stand_for_the_data_sets_own_list_before_the_prompts():
    own, known = ["zebra", "apple", "kiwi"], ["kiwi", "zebra", "apple"]
    places = {"of": "data d", "to": "prompts p"}
    assert match_through(["0", "2"], own, known, **places) == (1, 0)
    assert match_through(["0", "2"], own, None, **places) == (0, 2)
    assert match_through(["0", "2"], None, known, **places) == (0, 2)
    assert match_through(["apple", "zebra"], own, None, **places) == (1, 0)
    assert match_through(["b", "a"], None, None, **places) == (0, 1)
    with pytest.raises(InputError, match=r"not in its classnames.txt: 'plum'"):
        match_through(["plum", "kiwi"], own, known, **places)


def test_whole_numbers_are_sorted_as_numbers():
    assert in_class_order(str(n) for n in range(12)) == [str(n) for n in range(12)]
    assert in_class_order(["10", "9", "b", "9"]) == ["10", "9", "b"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("owl", 5),
        (" OWL ", 5),
        (0, 4),
        (np.int64(1), 5),
        (1.0, 5),
        (np.float32(2), 6),
        ("1", 5),
        ("2.0", 6),
        (True, 6),
        (np.bool_(True), 6),
        ("true", 6),
        (False, None),
        (3, None),
        (-1, None),
        (10**400, None),
        ("9" * 5000, None),
        ("²", None),
        ("٢", None),
        (1.5, None),
        (float("nan"), None),
        (float("inf"), None),
        (None, None),
        ([1], None),
        (b"owl", None),
        (Decimal(1), None),
    ],
)
def test_a_label_of_any_type(value, expected):
    assert ClassLabels(["cat", "owl", "True"], [4, 5, 6]).index(value) == expected


def test_labels_without_names_are_numbers_and_texts_may_be_names_alone():
    assert [ClassLabels(None).index(value) for value in ("7", 7, "owl", -1, "7.5")] == [7, 7, None, None, None]
    assert [ClassLabels(["1", "2"], texts_are_names=True).index(value) for value in ("1", "0", 0)] == [0, None, 0]
