"""Which way kernels take through Triton, and what a call becomes by our own."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.interpreters import mlir
from jaxlib.mlir import ir

import pallas_kernels as ops
from pallas_kernels import own_triton, triton_route
from pallas_kernels.own_triton import stock
from tests.support import recorded_launches
from tests.support.kernel_cases import ALL_HEADS, kernel_cases
from tests.support.lowering import _operations, lower_for

ROOT = Path(__file__).parents[3]


@pytest.fixture
def stock_route(monkeypatch):
    jax.clear_caches()
    recorded_launches.install(monkeypatch)
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    "asked, jax_has, own",
    [
        (None, True, False),
        ("", True, False),
        (None, False, True),
        ("own", True, True),
        ("own", False, True),
        ("stock", True, True),
        ("stock", False, True),
        ("jax", True, False),
    ],
)
def test_choice(monkeypatch, asked, jax_has, own):
    choose(monkeypatch, asked, jax_has)
    assert triton_route.takes_own_route() == own


@pytest.mark.parametrize(
    "asked, error, said",
    [
        ("jax", ModuleNotFoundError, "WAVEJAX_TRITON is jax, but JAX .* leave the variable out"),
        ("mosaic", ValueError, "WAVEJAX_TRITON: no route 'mosaic'; give jax, own or stock"),
    ],
)
def test_no_choice(monkeypatch, asked, error, said):
    choose(monkeypatch, asked, False)
    with pytest.raises(error, match=said):
        triton_route.takes_own_route()


def choose(monkeypatch, asked, jax_has):
    if asked is None:
        monkeypatch.delenv("WAVEJAX_TRITON", raising=False)
    else:
        monkeypatch.setenv("WAVEJAX_TRITON", asked)
    if not jax_has:
        monkeypatch.setattr(triton_route, "_triton", None)


def test_without_the_package_the_compiler_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.backends.compiler", None)
    with pytest.raises(ModuleNotFoundError, match=r"3\.4 or later: pip install triton"):
        stock.compile_text("module {}", "cuda", 90, 4, 2)


def launches(program):
    """Each call of a kernel: its target, its attributes, its aliases, its operands' types."""
    found = []
    with mlir.make_ir_context():
        module = ir.Module.parse(program)
        for call in _operations(module.operation):
            if call.name != "stablehlo.custom_call" or "mhlo.backend_config" not in call.attributes:
                continue
            target = ir.StringAttr(call.attributes["call_target_name"]).value
            config = {x.name: x.attr for x in ir.DictAttr(call.attributes["mhlo.backend_config"])}
            attributes = {
                name: ir.StringAttr(x).value_bytes
                if isinstance(x, ir.StringAttr)
                else ir.IntegerAttr(x).value
                for name, x in config.items()
                if isinstance(x, ir.StringAttr) or str(x).endswith(" : i32")
            }
            has_aliases = "output_operand_aliases" in call.attributes
            aliases = str(call.attributes["output_operand_aliases"]) if has_aliases else ""
            types = [str(operand.type) for operand in call.operands]
            found.append((target, attributes, aliases, types))
    return found


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("name", ["append_rows", "attend_zones", "attend_zones-host"])
def test_a_text_is_handed_to_xla_as_jaxs_is(monkeypatch, name, platform):
    """The same call but for the text: of the same kernel, which names its arrays alike."""
    case = kernel_cases(ALL_HEADS[0])[name]
    found = {}
    for route in ("own", "jax"):
        monkeypatch.setenv("WAVEJAX_TRITON", route)
        jax.clear_caches()
        found[route] = launches(lower_for(platform, case.function, *case.operands))
    jax.clear_caches()
    assert len(found["own"]) == len(found["jax"]) >= 1
    for (target, own, *rest), (expected, jaxs, *others) in zip(*found.values(), strict=True):
        assert target == expected == "__gpu$xla.gpu.triton"
        assert rest == others  # aliases, and the operands' types
        texts = [said.pop("ir") for said in (own, jaxs)]
        assert own == jaxs
        assert f"tt.func public @{own['name'].decode()}(".encode() in texts[0]
        assert own["name"] in texts[1]


@pytest.mark.parametrize("name", ["append_rows", "attend_zones", "attend_zones-host"])
def test_a_call_is_jaxlibs_with_the_same_aliases(stock_route, monkeypatch, name):
    case = kernel_cases(ALL_HEADS[0])[name]
    found = launches(lower_for("cuda", case.function, *case.operands))
    assert {target for target, *_ in found} == {"triton_kernel_call_ffi"}
    monkeypatch.setenv("WAVEJAX_TRITON", "jax")
    jax.clear_caches()
    expected = launches(lower_for("cuda", case.function, *case.operands))
    assert all(target.endswith("gpu.triton") for target, *_ in expected)
    assert [call[2:] for call in found] == [call[2:] for call in expected]
    assert any(aliases for *_, aliases, _ in found)
    for (_, own, *_), (_, jaxs, _, operands) in zip(found, expected, strict=True):
        said = recorded_launches.launch_of(own["opaque"])
        kernel, warps, stages = said["kernel"], jaxs["num_warps"], jaxs["num_stages"]
        assert kernel["name"].encode() == own["name"] == jaxs["name"]
        assert all(said[f"grid_{axis}"] == jaxs[f"grid_{axis}"] for axis in "xyz")
        assert kernel["code"] == f"cuda 90 {warps} {stages}"
        assert (kernel["num_warps"], kernel["num_ctas"], kernel["shared"]) == (warps, 1, 1234)
        arrays = kernel["text"].count("tt.divisibility = 16")
        assert said["parameters"][:arrays] == [["array", 0, 16]] * arrays
        assert said["parameters"][arrays:] == [["scalar", 0, "u64"]] * 2
        assert arrays > len(operands)


def test_an_operand_may_be_none_and_a_name_anything(stock_route):
    def kernel(x, nothing, out):
        assert nothing is None
        out[...] = x[...] + 1

    x = jnp.zeros(8)
    run = own_triton.pallas_call(
        kernel,
        num_warps=1,
        num_stages=1,
        name="8 of: one",
        out_shape=jax.ShapeDtypeStruct((8,), jnp.float32),
        grid=(1,),
        in_specs=[pl.no_block_spec, None],
        out_specs=pl.no_block_spec,
    )
    [(_, attributes, _, operands)] = launches(lower_for("cuda", lambda x: run(x, None), x))
    assert len(operands) == 1
    assert attributes["name"] == b"kernel_8_of__one"
    batched = jax.make_jaxpr(jax.vmap(lambda x: run(x, None)))(jnp.zeros((3, 8)))
    assert batched.out_avals[0].shape == (3, 8)
    assert [e.primitive.name for e in batched.jaxpr.eqns][-1] == "scan"
    [call] = launches(lower_for("cuda", jax.vmap(lambda x: run(x, None)), jnp.zeros((3, 8))))
    assert call[0] == "triton_kernel_call_ffi"


def test_an_amd_gpu_is_refused_with_what_to_do(stock_route):
    case = kernel_cases(ALL_HEADS[0])["merge_states"]
    with pytest.raises(NotImplementedError, match="stock, which does not launch kernels on rocm"):
        lower_for("rocm", case.function, *case.operands)


WITHOUT_JAXS = """
import tests.support.without_triton
import jax, numpy as np, pytest
from tests.support import recorded_launches
from tests.support.kernel_cases import ALL_HEADS, kernel_cases
from pallas_kernels.merge_states import triton as merge_states, reference

with pytest.raises(ImportError):
    import jax.experimental.pallas.triton
outputs = jax.random.normal(jax.random.key(0), (3, 1, 2, 4, 64))
found = merge_states.merge_states(outputs, outputs[..., 0], interpret=True)
expected = reference.merge_states(outputs, outputs[..., 0])
for x, y in zip(found, expected):
    np.testing.assert_allclose(x, y, rtol=1e-5)

case = kernel_cases(ALL_HEADS[0])["attend_zones"]
lower = lambda: jax.jit(case.function).trace(*case.operands).lower(
    lowering_platforms=("cuda",)).as_text()
assert "__gpu$xla.gpu.triton" in lower()
jax.clear_caches()
with pytest.MonkeyPatch.context() as patch:
    recorded_launches.install(patch)
    assert "triton_kernel_call_ffi" in lower()
print("done")
"""


def test_without_jaxs_backend():
    """Interpreted kernels run, and others lower by our own route, or say what to install."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JAXS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]


def test_blocks_of_arrays_are_refused():
    """They would be taken for the whole arrays."""

    def double(x_ref, o_ref):
        o_ref[...] = 2 * x_ref[...]

    block = pl.BlockSpec((8,), lambda i: (i,))
    call = own_triton.pallas_call(
        double,
        num_warps=4,
        num_stages=1,
        name="double",
        grid=(2,),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((16,), jnp.float32),
    )
    with pytest.raises(NotImplementedError, match="double: a kernel gets blocks of its arrays"):
        call(jnp.zeros(16))


def test_without_a_gpu_a_kernel_says_what_to_do(monkeypatch):
    monkeypatch.setenv("WAVEJAX_TRITON", "own")
    states = jnp.zeros((3, 1, 1, 4, 64)), jnp.zeros((3, 1, 1, 4))
    with pytest.raises(NotImplementedError, match="merge_states is a kernel for GPUs: interpret"):
        ops.merge_states(*states, implementation="triton")
