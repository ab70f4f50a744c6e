"""How an op's implementation is chosen, what is told of it, and when a fallback is a warning."""

import threading
import types
import warnings

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

import pallas_kernels as ops
from pallas_kernels import backend, dispatch

BY = {"xla": lambda: "plain JAX", "triton": lambda: "the kernel"}


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    ops.forget()
    yield
    ops.forget()


def pretend(monkeypatch, kind="NVIDIA H200", capability="9.0", backend="gpu"):
    device = types.SimpleNamespace(device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [device])


def choose(implementation=None, by=BY):
    return dispatch.call("an_op", implementation, by)


def told():
    return [(choice.op, choice.implementation, choice.reason) for choice in ops.explain()]


def unsupported():
    raise NotImplementedError("an_op: head_dim is 32; the kernel knows 64")


def test_the_variable_chooses_the_context_wins_over_it_the_argument_over_both(monkeypatch):
    pretend(monkeypatch)
    assert choose() == "the kernel"
    monkeypatch.setenv(dispatch.VARIABLE, "xla")
    assert choose() == "plain JAX"
    with ops.use_implementation("triton"):
        assert choose() == "the kernel"
        assert choose("xla") == "plain JAX"
        with ops.use_implementation("xla"):
            assert choose() == "plain JAX"
        assert choose() == "the kernel"
    with ops.use_implementation("auto"):
        assert choose() == "the kernel"
    assert choose() == "plain JAX"
    assert choose("auto") == "the kernel"
    monkeypatch.setenv(dispatch.VARIABLE, "")
    assert choose() == "the kernel"
    pretend(monkeypatch, backend="cpu")
    assert choose() == "plain JAX"
    assert told() == [
        ("an_op", "triton", "the kernel supports this case"),
        ("an_op", "xla", "asked for by WAVEJAX_IMPLEMENTATION"),
        ("an_op", "triton", "asked for by use_implementation"),
        ("an_op", "xla", "asked for by its argument"),
        ("an_op", "xla", "asked for by use_implementation"),
        ("an_op", "xla", "there are no kernels for cpu"),
    ]


def test_names_that_do_not_exist_are_errors(monkeypatch):
    message = "no implementation 'cuda'; give one of auto, xla, triton, tpu"
    # Tests check what is passed before the function does.
    with (
        pytest.raises((ValueError, TypeCheckError), match="'cuda'"),
        ops.use_implementation("cuda"),
    ):
        pass
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"WAVEJAX_IMPLEMENTATION: {message}"):
        choose()


def test_a_jitted_caller_is_traced_anew_in_a_context(monkeypatch):
    pretend(monkeypatch)
    by = {"xla": lambda x: x + 1, "triton": lambda x: x + 2}
    traced = []

    @jax.jit
    def add(x):
        traced.append(None)
        return dispatch.call("an_op", None, by, x)

    assert add(0) == 2
    with ops.use_implementation("xla"):
        assert add(0) == 1
    assert add(0) == 2
    with ops.use_implementation("xla"):
        assert add(0) == 1
    assert len(traced) == 2


def test_a_context_holds_for_its_own_thread(monkeypatch):
    pretend(monkeypatch)
    found = []
    with ops.use_implementation("xla"):
        thread = threading.Thread(target=lambda: found.append(choose()))
        thread.start()
        thread.join()
        assert choose() == "plain JAX"
    assert found == ["the kernel"]


def test_a_context_ends_with_an_error(monkeypatch):
    pretend(monkeypatch)
    with pytest.raises(RuntimeError), ops.use_implementation("xla"):
        raise RuntimeError
    assert choose() == "the kernel"


def test_a_fallback_on_a_gpu_is_a_warning_once_for_each_reason(monkeypatch):
    pretend(monkeypatch)
    by = BY | {"triton": unsupported}
    with pytest.warns(ops.FallbackWarning) as caught:
        assert choose(by=by) == "plain JAX"
    expected = "an_op runs in plain JAX on a GPU: head_dim is 32; the kernel knows 64"
    assert str(caught[0].message) == expected
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(by=by) == "plain JAX"
    assert told() == [("an_op", "xla", "head_dim is 32; the kernel knows 64")]
    with pytest.raises(NotImplementedError, match="head_dim is 32"):
        choose("triton", by)


def test_no_warning_where_plain_jax_is_what_is_wanted(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(by=BY | {"triton": unsupported}) == "plain JAX"  # on a CPU
        pretend(monkeypatch)
        choose("xla")
        assert choose(by={"xla": BY["xla"]}) == "plain JAX"
    assert told()[-1] == ("an_op", "xla", "plain JAX serves this case best")


def test_explain_is_a_table_of_what_ops_took():
    assert len(ops.explain()) == 0
    outputs, logsumexps = jnp.ones((2, 1, 1, 1, 4)), jnp.ones((2, 1, 1, 1))
    for _ in range(2):
        jax.jit(lambda *x: ops.merge_states(*x))(outputs, logsumexps)
    with ops.use_implementation("xla"):
        ops.append_rows(ops.Rows(jnp.zeros((1, 1, 1, 8, 2, 4))), jnp.ones((1, 2, 2, 4)), 0, 0, 0)
    platform = jax.default_backend()
    first, second = ops.explain()
    assert first == ops.Choice(
        "merge_states", "xla", platform, f"there are no kernels for {platform}"
    )
    assert second == ops.Choice("append_rows", "xla", platform, "asked for by use_implementation")
    assert str(ops.explain()).splitlines() == [
        "op            implementation  platform  reason",
        "merge_states  xla             cpu       there are no kernels for cpu",
        "append_rows   xla             cpu       asked for by use_implementation",
    ]


@pytest.mark.parametrize(
    "kind, capability, kernels",
    [
        ("NVIDIA H200", "9.0", True),
        ("NVIDIA RTX PRO 6000", "12.0", True),
        ("NVIDIA T4", "7.5", False),
        ("AMD Instinct MI300X", "gfx942", True),
    ],
)
def test_gpus_too_old_for_the_kernels_get_plain_jax(monkeypatch, kind, capability, kernels):
    pretend(monkeypatch, kind, capability)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert choose() == ("the kernel" if kernels else "plain JAX")
    assert choose("triton") == "the kernel"
    messages = [str(warning.message) for warning in caught]
    expected = "an_op runs in plain JAX on a GPU: the GPU has compute capability 7.5; the kernels "
    assert messages == ([] if kernels else [expected + "need 8.0"])


def test_a_tpu_takes_its_own_kernels_and_no_others(monkeypatch):
    """Without a warning: there most ops are meant to run in plain JAX."""
    pretend(monkeypatch, "TPU v6 lite", backend="tpu")
    of_tpu = BY | {"tpu": lambda: "the TPU's kernel"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(by=of_tpu) == "the TPU's kernel"
        assert choose("xla", of_tpu) == "plain JAX"
        assert choose(by=BY) == "plain JAX"
        assert choose(by=BY | {"tpu": unsupported}) == "plain JAX"
    assert told() == [
        ("an_op", "tpu", "the kernel supports this case"),
        ("an_op", "xla", "asked for by its argument"),
        ("an_op", "xla", "there is no kernel for tpu"),
        ("an_op", "xla", "head_dim is 32; the kernel knows 64"),
    ]
    pretend(monkeypatch)
    assert choose(by=of_tpu) == "the kernel"
    assert choose("tpu", of_tpu) == "the TPU's kernel"


def test_a_program_for_tpus_takes_their_kernels_on_any_machine():
    by = BY | {"tpu": lambda: "the TPU's kernel"}
    assert choose(by=by) == "plain JAX"
    with backend.traced_for_tpu():
        assert choose(by=by) == "the TPU's kernel"
    assert choose(by=by) == "plain JAX"


@pytest.mark.parametrize(
    "first, taken", [(lambda: "the kernel", "the kernel"), (None, "plain JAX")]
)
def test_mosaic_gpu_is_taken_only_if_the_op_or_the_caller_asks_for_it(first, taken, monkeypatch):
    pretend(monkeypatch)
    by = {"xla": BY["xla"], "mosaic_gpu": lambda: "Mosaic's", "triton": first or unsupported}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert choose(by=by) == taken
    assert choose("mosaic_gpu", by) == "Mosaic's"
    with dispatch.use_implementation("mosaic_gpu"):
        assert choose(by=by) == "Mosaic's"


@pytest.mark.parametrize("capability, first", [("9.0", True), ("8.9", False), ("10.0", False)])
def test_on_hopper_an_op_may_be_faster_by_mosaic_gpu(capability, first, monkeypatch):
    pretend(monkeypatch, capability=capability)
    by = BY | {"mosaic_gpu": lambda: "Mosaic's"}
    preferred = {"on_hopper": "mosaic_gpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dispatch.call("an_op", None, by, **preferred)
        assert found == ("Mosaic's" if first else "the kernel")
        assert dispatch.call("an_op", "triton", by, **preferred) == "the kernel"
        # What it does not support the other kernel may.
        refused = by | {"mosaic_gpu": unsupported}
        assert dispatch.call("an_op", None, refused, **preferred) == "the kernel"
    neither = refused | {"triton": unsupported}
    with pytest.warns(ops.FallbackWarning, match="head_dim is 32"):
        assert dispatch.call("an_op", None, neither, **preferred) == "plain JAX"


def test_full_attention_is_by_mosaic_gpu_on_hopper(monkeypatch):
    pretend(monkeypatch)
    shapes = [(1, 2, 4, 64), (1, 1, 2, 256, 64), (1, 1, 2, 256, 64)]
    query, *rows = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)

    def attend(query, keys, values):
        rows = ops.Rows(keys), ops.Rows(values)
        return ops.attend_dense(query, *rows, jnp.array([256]), 0, scale=0.125)

    jax.eval_shape(attend, query, *rows)
    wide = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (query, *rows)]
    jax.eval_shape(attend, *wide)
    assert [choice.implementation for choice in ops.explain()] == ["mosaic_gpu", "triton"]


def test_a_named_implementation_that_is_not_there_fails_loudly():
    with pytest.raises(
        NotImplementedError, match="an_op: no implementation 'triton'; there is: xla"
    ):
        dispatch.call("an_op", "triton", {"xla": jnp.sum}, jnp.zeros(1))
