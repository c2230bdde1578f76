"""Room on Python's call stack: a function that is only called."""

import sys

import pytest

from jpeft.hosts.call_stack import with_room


def test_it_returns_what_the_function_returns():
    def depth(n):
        return 0 if n == 0 else 1 + depth(n - 1)

    assert with_room(lambda: with_room(lambda: depth(200))) == 200
    with pytest.raises(KeyError):
        with_room(lambda: {}["absent"])
    with pytest.raises(RecursionError):
        with_room(lambda: depth(2 * sys.getrecursionlimit()))


def test_it_asks_for_more_than_a_chunk():
    assert with_room.__code__.co_stacksize * 8 > 2**14
