"""What routing reads of a prompt: short ones whole, the two ends of long ones."""

import pytest

from router.model.passes import MAX_TOKENS, truncated


@pytest.mark.parametrize("length", [1, 2, MAX_TOKENS - 1, MAX_TOKENS])
def test_a_short_prompt_is_read_whole(length):
    assert truncated([tuple(range(length))]) == [list(range(length))]


@pytest.mark.parametrize("length", [MAX_TOKENS + 1, 10 * MAX_TOKENS])
def test_of_a_long_prompt_both_ends_are_read(length):
    half = MAX_TOKENS // 2
    assert truncated([[7], list(range(length))]) == [[7], [*range(half), *range(length - half, length)]]
