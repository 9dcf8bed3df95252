"""The checks at the door: NumPy's numbers are numbers, booleans are none, and the message has the name, the value and the limit."""

import numpy as np
import pytest

from fewer.checks import check_choice, check_not_negative, check_positive, check_share, check_whole


@pytest.mark.parametrize("good", [1, np.int64(3), np.uint8(1)])
def test_whole_numbers_of_python_and_numpy_pass(good):
    check_whole(n=good)


@pytest.mark.parametrize("bad", [0, -1, 1.0, True, "1", None, float("nan"), np.float32(2)])
def test_what_is_no_whole_number_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=r"^n is .*; expected a whole number of at least 1"):
        check_whole(n=bad)


def test_optional_values_may_be_none_and_others_may_not():
    check_whole(optional=["patience"], patience=None, epochs=1)
    with pytest.raises(ValueError, match="epochs is None"):
        check_whole(optional=["patience"], patience=None, epochs=None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-9, "1", None, True])
def test_numbers_are_finite_and_on_the_right_side_of_zero(bad):
    for check in (check_positive, check_not_negative):
        with pytest.raises(ValueError, match="x is .*; expected a finite number"):
            check(x=bad)
    check_not_negative(x=0)
    with pytest.raises(ValueError, match="above 0"):
        check_positive(x=0)


def test_shares_lie_between_zero_and_one():
    check_share(x=0.0, y=1, z=np.float32(0.5))
    for bad in (-0.1, 1.1, float("nan"), "half"):
        with pytest.raises(ValueError, match="x is .*; expected a number from 0 to 1"):
            check_share(x=bad)
    with pytest.raises(ValueError, match="between 0 and 1"):
        check_share(ends=False, x=1.0)


def test_choices_name_the_nearest():
    check_choice(["a", 2], x=2)
    with pytest.raises(ValueError, match="x is 'forwrad'; expected one of forward, backward: did you mean 'forward'"):
        check_choice(["forward", "backward"], x="forwrad")
    with pytest.raises(ValueError, match=r"x is \[\]; expected one of a"):
        check_choice(("a",), x=[])
