"""Steps whose estimate is corrected by a pooled covariance; and the same in float64, by loops."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.types import Pooled
from tests.support.rest_cases import CLUSTERS, LAYER, LAYERS, rest_case

SCALE = 0.2


def pooled_case(seed, group, head_dim, *, dtype="float32", far=1.0, **kinds):
    """A step as `rest_case` makes it, with a covariance in place of moments.

    Deviations of clusters of which nothing is to be estimated are NaN.
    """
    case = rest_case(seed, group, head_dim, dtype=dtype, **kinds)
    del case["correction"]
    # Here a cluster keeps what it is said to keep, and kernels read all up to the last one kept.
    unknown = jnp.isnan(case["value_means"][LAYER].astype(jnp.float32)).any(-1)
    case["remaining"] = jnp.where(unknown, 0, case["remaining"])
    last = jnp.max(jnp.where(case["remaining"] > 0, jnp.arange(CLUSTERS), -1), axis=-1)
    read = (jnp.arange(CLUSTERS) < last[..., None])[None, ..., None]
    case["value_means"] = jnp.where(read & unknown[None, ..., None], 9, case["value_means"])
    rng = np.random.default_rng(seed + 1)
    batch, heads = case["query"].shape[:2]
    roots = rng.normal(size=(batch, heads, head_dim, head_dim)) / head_dim**0.5
    matrices = np.stack(
        [roots @ roots.swapaxes(-1, -2), rng.normal(size=roots.shape) / head_dim**0.5], axis=2
    )
    query = np.asarray(case["query"], np.float64)
    products = SCALE * np.einsum("bhgd,bhked->bhgke", query, matrices)
    deviations = np.full((LAYERS, batch, heads, CLUSTERS), np.nan)
    sizes = np.diff(np.asarray(case["offsets"]), axis=-1)[LAYER]
    keeps = np.minimum(np.asarray(case["remaining"]), sizes) > 0
    deviations[LAYER][keeps] = far * rng.gamma(2.0, size=keeps.sum()) / 2
    case["pooled"] = Pooled(
        jnp.asarray(products, jnp.float32), jnp.asarray(deviations, case["value_means"].dtype)
    )
    return case


def by_loops(case):
    """The estimate of every query head that has one: (b, h, g), output and logsumexp."""
    arrays = {name: np.asarray(x, np.float64) for name, x in case.items() if name != "pooled"}
    products = np.asarray(case["pooled"].products, np.float64)
    deviations = np.asarray(case["pooled"].deviations, np.float64)[LAYER]
    for b, h, g in np.ndindex(arrays["query"].shape[:3]):
        mass, total = [], []
        towards, along = products[b, h, g]
        length = np.sqrt(SCALE * arrays["query"][b, h, g] @ towards)
        for c in range(CLUSTERS):
            members = arrays["offsets"][LAYER, b, h, c + 1] - arrays["offsets"][LAYER, b, h, c]
            left = min(arrays["remaining"][b, h, c], members)
            if left <= 0:
                continue
            deviation = deviations[b, h, c]
            sigma = deviation * length
            share = (left - 1) / left / ((members - 1) / members) if members > 1 else 0
            logit = arrays["logits"][b, h, g, c] - 0.2 * sigma * min((members - left) / left, 25)
            first, more = left * np.exp(logit), min(share * sigma**2 / 2, 2)
            mass.append(first * (1 + more))
            mean = arrays["value_means"][LAYER, b, h, c]
            total.append(first * ((1 + more) * mean + share * deviation**2 * along))
        if mass:
            yield (b, h, g), np.sum(total, 0) / np.sum(mass), np.log(np.sum(mass))
