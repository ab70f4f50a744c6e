"""Appended tokens attend exactly to rows at hand and stored ones, in plain JAX."""

import pytest

from tests.support.appended_cases import ROOM, check_attend


@pytest.mark.parametrize("stored", [0, 1, 2048, 4321, ROOM])
@pytest.mark.parametrize("dtype, atol", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_by_blocks_it_is_what_float64_gives(stored, dtype, atol):
    check_attend(stored, dtype, 16, seed=stored, atol=atol)
