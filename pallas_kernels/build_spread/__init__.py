"""The op `build_spread`. Its meaning is in `reference.py`; there are no kernels yet."""

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.build_spread import reference
from pallas_kernels.dispatch import Implementation, no_kernel
from pallas_kernels.moments import Spread
from pallas_kernels.types import Clusters


def build_spread(
    keys: Float[Array, "*rows tokens head_dim"],
    values: Float[Array, "*rows tokens head_dim"],
    clusters: Clusters,
    *,
    implementation: Implementation | None = None,
) -> Spread:
    """Measure how far each cluster's members lie from its means: what bounds are made of.

    Rounded up by a hundred-thousandth. Zeros for an empty cluster; NaN where a member is not
    finite.

    Args:
        keys: post-RoPE keys of a segment a row, as `build_clusters` took them.
        values: likewise.
        clusters: what it made of them, in float32.
        implementation: see `pallas_kernels.dispatch.call`.
    """
    return dispatch.call(
        "build_spread",
        implementation,
        {"xla": reference.build_spread, "triton": no_kernel("build_spread")},
        keys,
        values,
        clusters,
    )
