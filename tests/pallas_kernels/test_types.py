"""The package's docstring lists what it exports."""

import dataclasses

import pallas_kernels as ops
from pallas_kernels import types


def test_all_that_is_exported_is_in_the_docstring():
    assert sorted(ops.__all__) == sorted(set(ops.__all__))
    assert not [name for name in ops.__all__ if f"`{name}`" not in ops.__doc__]


def test_every_value_that_ops_hand_to_each_other_is_exported():
    fields = {
        name: getattr(value, "_fields", None) or [x.name for x in dataclasses.fields(value)]
        for name, value in vars(types).items()
        if hasattr(value, "_fields") or dataclasses.is_dataclass(value)
    }
    assert {"Rows", "SelectionSettings"} <= set(fields) <= set(ops.__all__)
    for name, names in fields.items():
        for field in names:
            assert field in getattr(types, name).__doc__.split("Attributes:")[1]
