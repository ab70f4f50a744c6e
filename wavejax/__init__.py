"""wavejax: long-context decoding over a clustered KV cache (RetroInfer, arXiv 2505.02922).

A public name is imported when it is first asked for: `python -m wavejax.generate` imports this
package before its own module, and must set up signals before JAX is imported, which takes seconds.
"""

import importlib

TYPE_CHECKING = False  # True for type-checkers; `typing` itself takes long to import
if TYPE_CHECKING:
    from models.errors import InputError as InputError
    from wavejax.attention.dense import DenseAttention as DenseAttention
    from wavejax.attention.wave import WaveAttention as WaveAttention
    from wavejax.config import WaveConfig as WaveConfig
    from wavejax.engine.generator import DecodeState as DecodeState
    from wavejax.engine.generator import Generator as Generator
    from wavejax.engine.sampling import Sampler as Sampler
    from wavejax.planning.plan import Plan as Plan
    from wavejax.planning.plan import make_plan as make_plan
    from wavejax.store.index import WaveIndex as WaveIndex
    from wavejax.store.rows import RowCache as RowCache
    from wavejax.store.rows import RowStore as RowStore
    from wavejax.store.state import WaveState as WaveState
    from wavejax.store.steady import SteadyZone as SteadyZone

_MODULE_OF = {
    "InputError": "models.errors",
    "RowCache": "wavejax.store.rows",
    "RowStore": "wavejax.store.rows",
    "SteadyZone": "wavejax.store.steady",
    "WaveConfig": "wavejax.config",
    "DenseAttention": "wavejax.attention.dense",
    "DecodeState": "wavejax.engine.generator",
    "Generator": "wavejax.engine.generator",
    "WaveIndex": "wavejax.store.index",
    "Plan": "wavejax.planning.plan",
    "make_plan": "wavejax.planning.plan",
    "Sampler": "wavejax.engine.sampling",
    "WaveAttention": "wavejax.attention.wave",
    "WaveState": "wavejax.store.state",
}
__all__ = list(_MODULE_OF)


if not TYPE_CHECKING:  # which would take any name to be there

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        importlib.import_module("wavejax._metadata").import_jaxtyping()
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value  # so that it is looked up once
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
