"""The door to Pallas' Triton backend: who goes through it, and what is lowered for which GPUs."""

import ast
import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels import backend
from pallas_kernels.score_tokens import _query
from pallas_kernels.toolbox import launch
from tests.support.kernel_cases import ALL_HEADS, kernel_cases
from tests.support.lowering import lower_for, triton_kernels

ROOT = Path(__file__).parents[2]
FOLDERS = "pallas_kernels", "models", "wavejax", "scripts", "examples"


def imported(path):
    """The modules that a file imports, each as far as it is named."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield str(node.module)


def of_a_backend(module):
    """Whether a module is one of Pallas' backends, or none that JAX promises to keep."""
    if module.startswith("jax.experimental.pallas."):
        # Or else a name in Pallas itself.
        return importlib.util.find_spec(".".join(module.split(".")[:4])) is not None
    return module.startswith(("jax._src", "jax.extend", "jax.interpreters", "jaxlib"))


@pytest.mark.parametrize(
    "module, is_of_one",
    [
        ("jax.experimental.pallas.triton", True),
        ("jax.experimental.pallas.mosaic_gpu", True),
        ("jax.experimental.pallas.ops.gpu", True),
        ("jax._src.pallas.triton.primitives", True),
        ("jax.experimental.pallas.triton.load", True),
        ("jax.experimental.pallas", False),
        ("jax.experimental.pallas.when", False),
        ("jax.experimental.compute_on", False),
        ("jax.lax", False),
    ],
)
def test_these_modules_are_a_backends(module, is_of_one):
    assert of_a_backend(module) == is_of_one


def test_few_files_know_the_backends():
    """The doors, the choice of a route through Triton, and what our own route takes of JAX."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 150
    knowing = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if any(map(of_a_backend, imported(path)))
    }
    assert knowing == {
        "pallas_kernels/backend.py",
        "pallas_kernels/mosaic_gpu_route.py",
        "pallas_kernels/triton_route.py",
        "pallas_kernels/own_triton/_jax_internals.py",
    }


@pytest.mark.slow
def test_no_assembly_of_cuda_is_lowered_for_amd():
    """Whatever the host is, which here has no GPU: the kernels are traced for CUDA first."""
    launched = set()
    for name, case in kernel_cases(ALL_HEADS[0]).items():
        kernels = triton_kernels(lower_for("rocm", case.function, *case.operands))
        launched |= {kernel.name for kernel in kernels}
        for kernel in kernels:
            assert "inline_asm" not in kernel.module, f"{name}: {kernel.name}"
    assert len(launched) >= 24


def test_the_same_trace_is_lowered_for_both():
    """The platform is known at lowering only: one traced program serves both makers' GPUs."""
    case = kernel_cases(ALL_HEADS[0])["select_tokens"]
    texts = {}
    for platform in ("cuda", "rocm"):
        kernels = triton_kernels(lower_for(platform, case.function, *case.operands))
        texts[platform] = {kernel.name: "inline_asm" in kernel.module for kernel in kernels}
    assert texts["cuda"].keys() == texts["rocm"].keys()
    assert {name for name, has in texts["cuda"].items() if has} >= {"pick_rows", "list_contenders"}
    assert not any(texts["rocm"].values())


def test_a_packed_query_is_unpacked_for_amd_only():
    case = kernel_cases(ALL_HEADS[0])["score_tokens-packed"]
    for platform, unpacked in (("cuda", False), ("rocm", True)):
        text = lower_for(platform, case.function, *case.operands)
        assert ("stablehlo.transpose" in text) == unpacked


def asks():
    """A function of the platform: 1 where CUDA's assembly is taken, else 2; and how often asked."""
    asked = []

    @backend.per_platform
    def function(tree, *, factor):
        asked.append(backend.takes_assembly())
        return {"y": tree["x"] * (factor if backend.takes_assembly() else 2 * factor)}

    return function, asked


def test_a_function_is_traced_for_the_platform_it_is_lowered_for():
    function, asked = asks()
    traced = jax.jit(functools.partial(function, factor=3)).trace({"x": jnp.float32(1)})
    assert asked == [True]
    texts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cuda", "rocm", "cpu", "cuda")
    }
    # Traced again for the one that was not guessed.
    assert asked == [True, False]
    assert "dense<6.0" in texts["rocm"]
    assert "dense<3.0" in texts["cuda"]
    assert "dense<3.0" in texts["cpu"]


def test_a_function_per_platform_is_one_of_jax():
    """Without `jit`, under `vmap`, in a loop and in `shard_map`; and nothing is left behind."""
    function, _ = asks()
    call = functools.partial(function, factor=3)
    assert call({"x": 2.0})["y"] == 6
    np.testing.assert_array_equal(jax.vmap(call)({"x": jnp.arange(3.0)})["y"], [0, 3, 6])
    np.testing.assert_array_equal(
        jax.vmap(call, in_axes=1, out_axes=1)({"x": jnp.ones((2, 3))})["y"], 3 * np.ones((2, 3))
    )
    with jax.disable_jit():
        assert call({"x": 2.0})["y"] == 6
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    for check_vma in (False, True):
        sharded = jax.shard_map(
            call, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"),
            check_vma=check_vma,
        )  # fmt: skip
        np.testing.assert_array_equal(jax.jit(sharded)({"x": jnp.arange(3.0)})["y"], [0, 3, 6])
    found = jax.lax.fori_loop(0, 3, lambda _, x: call({"x": x})["y"], jnp.float32(1))
    assert found == 27
    jitted = jax.jit(lambda x: call({"x": x})["y"]).lower(2.0).as_text()
    plain = jax.jit(lambda x: x * 3).lower(2.0).as_text()
    assert jitted.splitlines()[1:] == plain.splitlines()[1:]


def test_assembly_that_nobody_asked_for_is_an_error_for_other_gpus():
    def kernel(x_ref, y_ref):
        y_ref[...] = launch.assembly("mov.b32 $0, $1;", x_ref[...], dtype=jnp.int32)

    def call(x):
        return launch.call(kernel, (x,), x, (1,), name="copy", num_warps=1)

    x = jax.ShapeDtypeStruct((32,), jnp.int32)
    assert "copy" in lower_for("cuda", call, x)
    with pytest.raises(RuntimeError, match="lowered for rocm; the kernel wants to ask backend"):
        lower_for("rocm", call, x)


@pytest.mark.parametrize("group, head_dim", [(3, 64), (7, 96), (16, 256)])
def test_a_query_is_unpacked_to_what_it_was_rounded_to(group, head_dim):
    rng = np.random.default_rng(group)
    query = jnp.asarray(rng.normal(size=(2, 3, group, head_dim)), jnp.float32)
    packed = jax.jit(functools.partial(_query.pack, scale=0.3, interpret=True))(query)
    found = jax.jit(functools.partial(_query.unpack, scale=0.3), static_argnums=1)(packed, head_dim)
    step = np.abs(query).max(axis=-1, keepdims=True) / 127
    # The rounded number of steps itself, to float32.
    np.testing.assert_allclose(found, np.floor(query / step + 0.5) * step, rtol=1e-5, atol=1e-7)
