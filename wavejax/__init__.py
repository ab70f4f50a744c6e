"""wavejax: long-context decoding over a clustered KV cache (RetroInfer, arXiv 2505.02922).

A public name is imported when it is first asked for: `python -m wavejax.generate` imports this
package before its own module, and must set up signals before JAX is imported, which takes seconds.
"""

import importlib

TYPE_CHECKING = False  # True for type-checkers; `typing` itself takes long to import
if TYPE_CHECKING:
    from models.errors import InputError as InputError
    from wavejax.buffer import RowCache as RowCache
    from wavejax.buffer import RowStore as RowStore
    from wavejax.buffer import SteadyZone as SteadyZone
    from wavejax.config import WaveConfig as WaveConfig
    from wavejax.dense_attention import DenseAttention as DenseAttention
    from wavejax.generator import DecodeState as DecodeState
    from wavejax.generator import Generator as Generator
    from wavejax.index import WaveIndex as WaveIndex
    from wavejax.plan import Plan as Plan
    from wavejax.plan import make_plan as make_plan
    from wavejax.sampling import Sampler as Sampler
    from wavejax.wave_attention import WaveAttention as WaveAttention
    from wavejax.wave_state import WaveState as WaveState

_MODULE_OF = {
    "InputError": "models.errors",
    "RowCache": "wavejax.buffer",
    "RowStore": "wavejax.buffer",
    "SteadyZone": "wavejax.buffer",
    "WaveConfig": "wavejax.config",
    "DenseAttention": "wavejax.dense_attention",
    "DecodeState": "wavejax.generator",
    "Generator": "wavejax.generator",
    "WaveIndex": "wavejax.index",
    "Plan": "wavejax.plan",
    "make_plan": "wavejax.plan",
    "Sampler": "wavejax.sampling",
    "WaveAttention": "wavejax.wave_attention",
    "WaveState": "wavejax.wave_state",
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
