"""The package's docstring lists what it exports."""

import pallas_kernels as ops
from pallas_kernels import types


def test_all_that_is_exported_is_in_the_docstring():
    assert sorted(ops.__all__) == sorted(set(ops.__all__))
    assert not [name for name in ops.__all__ if f"`{name}`" not in ops.__doc__]


def test_every_value_that_ops_hand_to_each_other_is_exported():
    named = {name for name, value in vars(types).items() if hasattr(value, "_fields")}
    assert named <= set(ops.__all__)
    for name in named:
        value = getattr(types, name)
        for field in value._fields:
            assert field in value.__doc__.split("Attributes:")[1]
