"""Each op's implementations take what its public function takes."""

import importlib
import inspect

import pytest

import pallas_kernels as ops

OPS = sorted(name for name in vars(ops) if inspect.isfunction(getattr(ops, name)) and "_" in name)
OPS.remove("use_implementation")
# In plain JAX alone: "auto" says so, and `dispatch.no_kernel` refuses.
WITHOUT_KERNEL = {"build_spread"}
WITH_TPU_KERNEL = {"attend_zones", "score_clusters"}
WITH_MOSAIC_GPU_KERNEL = {"attend_dense", "score_clusters"}


def taken(function):
    """Names, kinds and defaults of a function's parameters."""
    signature = inspect.signature(inspect.unwrap(function))
    return {name: (p.kind, p.default) for name, p in signature.parameters.items()}


def test_these_are_the_ops():
    assert len(OPS) == 14


@pytest.mark.parametrize("op", OPS)
def test_implementations_take_what_the_op_takes(op):
    of_op = taken(getattr(ops, op))
    assert len(of_op) <= 9
    assert of_op.pop("implementation") == (inspect.Parameter.KEYWORD_ONLY, None)
    names = ["reference"] if op in WITHOUT_KERNEL else ["reference", "triton"]
    names += ["tpu"] if op in WITH_TPU_KERNEL else []
    names += ["mosaic_gpu"] if op in WITH_MOSAIC_GPU_KERNEL else []
    plain, *kernels = (
        taken(getattr(importlib.import_module(f"pallas_kernels.{op}.{name}"), op)) for name in names
    )
    assert list(plain.items()) == list(of_op.items())
    for kernel in kernels:
        check_kernel(kernel, of_op)
    assert inspect.getdoc(getattr(ops, op))


def check_kernel(kernel, of_op):
    assert kernel.pop("config") == (inspect.Parameter.KEYWORD_ONLY, None)
    assert kernel.pop("interpret") == (inspect.Parameter.KEYWORD_ONLY, False)
    assert list(kernel.items()) == list(of_op.items())
