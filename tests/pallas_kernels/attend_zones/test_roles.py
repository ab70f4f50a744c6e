"""Which program of `attend_zones` takes which part, where processors choose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.attend_zones import triton as kernel
from pallas_kernels.attend_zones._roles import REMEMBERED_BYTES, by_processor, choose_part
from pallas_kernels.toolbox import launch
from tests.pallas_kernels.attend_zones.test_kernel import run_kernel, shapes, zone_case
from tests.support.lowering import lower_for, triton_modules
from tests.support.zone_operands import zone_operands

pytestmark = pytest.mark.optimised  # equal to the bit, as compiled for users


@pytest.mark.parametrize(
    "missed, others", [(64, 768), (64, 10), (64, 0), (5, 7), (128, 300), (132, 900), (1, 3)]
)
def test_each_part_is_one_programs(missed, others):
    def kernel(before, parts, claims):
        parts[pl.program_id(0)] = choose_part(claims, missed, others, 128, interpret=True)

    parts, claims = launch.call(
        kernel,
        (jnp.zeros(missed + 1, jnp.int32),),
        tuple(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (missed + others, missed + 1)),
        (missed + others,),
        name="choose",
        num_warps=4,
        aliases={0: 1},
        interpret=True,
    )
    np.testing.assert_array_equal(np.sort(parts), np.arange(missed + others))
    # Most parts of missed rows are taken by those that ask for them first.
    assert (np.asarray(claims)[:missed] >= 1).all()


def test_who_takes_a_part_changes_nothing(monkeypatch):
    case = zone_case(5, 7, 64, "bfloat16")
    in_order = run_kernel(case)
    asked = []
    monkeypatch.setattr(kernel, "by_processor", lambda *parts: asked.append(parts) or True)
    run_kernel.clear_cache()
    found = run_kernel(case)
    run_kernel.clear_cache()
    assert asked
    for one, other in zip(*map(jax.tree.leaves, (found, in_order)), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def on_host(function):
    """The same of operands whose store is moved to host memory first."""

    def run(operands):
        store = jax.device_put(operands["store"], jax.memory.Space.Host)
        return function(operands | {"store": store})

    return run


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_processors_choose_for_a_host_store_that_is_remembered(platform):
    """Which processor runs a program is asked in CUDA's assembly, which other GPUs do not take."""

    def attend(a):
        return kernel.attend_zones(*zone_operands(a), a["layer"], scale=0.1)

    operands = shapes(64, jnp.bfloat16)
    store = operands["store"]
    larger = operands | {"store": jax.ShapeDtypeStruct((3, *store.shape[1:]), store.dtype)}
    for each, function, chosen in (
        (operands, on_host(attend), platform == "cuda"),
        (operands, attend, False),
        (larger, on_host(attend), False),
    ):
        [text] = triton_modules(lower_for(platform, function, each))["attend_zones"]
        assert ("%smid" in text) == chosen


def test_many_parts_are_taken_in_order():
    store = jax.device_put(jnp.zeros((1, 1, 1, 8, 2, 64)), jax.memory.Space.Host)
    assert by_processor(store, 132)
    assert not by_processor(store, 133)
    assert store.nbytes < REMEMBERED_BYTES
