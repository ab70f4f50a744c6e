"""wavejax: long-context decoding over a clustered KV cache (RetroInfer, arXiv 2505.02922).

Text to text:

- `load`: a model with its tokenizer, from a path.
- `LanguageModel`: what `load` returns: `generate`, `stream`, `plan`, `flax`.
- `Generation`, `Answer`: the answers of a run, with finish reasons and facts.
- `TextStream`, `TextPiece`: answers piece by piece.
- `Sampler`: how tokens are drawn.

Tokens and logits:

- `Generator`: reads prompts and generates, for a model, an attention and a sampler.
- `DecodeState`: a batch of sequences between two steps.
- `Facts`: what a run retrieved, found cached, and occupies.
- `Plan`, `make_plan`: where a run's keys and values go, and what it takes of memory.

Documents, read once:

- `read_document`, `ask_document`: a text is kept on disk; a question costs its own tokens.
- `save_document`, `load_document`: a sequence's index, rows and tokens, kept on disk.
- `Document`: what `load_document` returns: `start` and `insert` put it into a batch.
- `DocumentCache`: a folder of them with a limit of size, for several processes.

Requests side by side:

- `batch_engine`: an engine of a loaded model; `BatchEngine` says all that it takes.
- `Request`: one prompt with its own settings.

Attentions:

- `WaveAttention`, `DenseAttention`: pure functions of a state, for any decoder.
- `Attention`: their interface, with the order of the calls. `CacheShape`: a KV cache's sizes.
- `WaveConfig`: the settings of wave attention. `AutoAttention`: wave or full, by the plan.
- `WaveState`, with its parts `WaveIndex`, `RowStore`, `RowCache` and `SteadyZone`.

Implementations of the ops:

- `explain`: what each op took, plain JAX or a kernel, and why.
- `use_implementation`: one implementation for all that is traced inside.
- `FallbackWarning`: on a GPU an op runs in plain JAX.

Errors: `InputError`, a line that says what was given, what was expected, and what to do.

Examples, of which `examples/` in the repository has longer ones:

    >>> import wavejax
    >>> model = wavejax.load()  # SmolLM2, or the path of a folder or file
    >>> result = model.generate("What is a key-value cache?", max_new_tokens=4)
    >>> len(result.token_ids) <= 4
    True
    >>> sampler = wavejax.Sampler(temperature=0.7, top_p=0.9)
    >>> for piece in model.stream("Tell me more.", max_new_tokens=2, sampler=sampler):
    ...     _ = piece.text
    >>> wavejax.Sampler(top_p=2.0)
    Traceback (most recent call last):
    models.errors.InputError: `top_p` is 2.0; it must be above 0 and at most 1
    >>> wavejax.WaveConfig.paper().cluster_size
    16
    >>> small = wavejax.WaveConfig(retrieval_fraction=0.02, min_retrieved_tokens=64)
    >>> attention = wavejax.WaveAttention(small, store="device")
    >>> generator = wavejax.Generator(model.config, attention, sampler, model.stop_tokens)
    >>> state = generator.start(model.params, [[3, 4, 5]], max_new_tokens=4, seed=1)
    >>> state, tokens = generator.decode_n(model.params, state, 4)
    >>> tokens.shape  # [steps, batch]
    (4, 1)
    >>> generator.facts(state).indexed_tokens
    0
    >>> plan = wavejax.make_plan(model.config, small, 1, 1000, 64, "bfloat16")
    >>> plan.need.rows_on
    'device'

A public name is imported when it is first asked for: `python -m wavejax.generate` imports this
package before its own module, and must set up signals before JAX is imported, which takes seconds.
"""

import importlib

TYPE_CHECKING = False  # True for type-checkers; `typing` itself takes long to import
if TYPE_CHECKING:
    from models.errors import InputError as InputError
    from pallas_kernels import FallbackWarning as FallbackWarning
    from pallas_kernels import explain as explain
    from pallas_kernels import use_implementation as use_implementation
    from wavejax.attention.dense import DenseAttention as DenseAttention
    from wavejax.attention.protocol import Attention as Attention
    from wavejax.attention.wave import WaveAttention as WaveAttention
    from wavejax.batching import batch_engine as batch_engine
    from wavejax.config import WaveConfig as WaveConfig
    from wavejax.documents.cache import DocumentCache as DocumentCache
    from wavejax.documents.document import Document as Document
    from wavejax.documents.document import load_document as load_document
    from wavejax.documents.document import save_document as save_document
    from wavejax.documents.text import ask_document as ask_document
    from wavejax.documents.text import read_document as read_document
    from wavejax.engine.batching.engine import BatchEngine as BatchEngine
    from wavejax.engine.batching.request import Request as Request
    from wavejax.engine.facts import Facts as Facts
    from wavejax.engine.generator import DecodeState as DecodeState
    from wavejax.engine.generator import Generator as Generator
    from wavejax.engine.sampling import Sampler as Sampler
    from wavejax.engine.text import Answer as Answer
    from wavejax.engine.text import Generation as Generation
    from wavejax.engine.text import TextPiece as TextPiece
    from wavejax.engine.text import TextStream as TextStream
    from wavejax.language_model import LanguageModel as LanguageModel
    from wavejax.loading import load as load
    from wavejax.planning.auto import AutoAttention as AutoAttention
    from wavejax.planning.plan import Plan as Plan
    from wavejax.planning.plan import make_plan as make_plan
    from wavejax.store.index import WaveIndex as WaveIndex
    from wavejax.store.rows import RowCache as RowCache
    from wavejax.store.rows import RowStore as RowStore
    from wavejax.store.shape import CacheShape as CacheShape
    from wavejax.store.state import WaveState as WaveState
    from wavejax.store.steady import SteadyZone as SteadyZone

_MODULE_OF = {
    "load": "wavejax.loading",
    "LanguageModel": "wavejax.language_model",
    "Generation": "wavejax.engine.text",
    "Answer": "wavejax.engine.text",
    "TextStream": "wavejax.engine.text",
    "TextPiece": "wavejax.engine.text",
    "Sampler": "wavejax.engine.sampling",
    "Generator": "wavejax.engine.generator",
    "DecodeState": "wavejax.engine.generator",
    "Facts": "wavejax.engine.facts",
    "read_document": "wavejax.documents.text",
    "ask_document": "wavejax.documents.text",
    "save_document": "wavejax.documents.document",
    "load_document": "wavejax.documents.document",
    "DocumentCache": "wavejax.documents.cache",
    "Document": "wavejax.documents.document",
    "batch_engine": "wavejax.batching",
    "BatchEngine": "wavejax.engine.batching.engine",
    "Request": "wavejax.engine.batching.request",
    "Plan": "wavejax.planning.plan",
    "make_plan": "wavejax.planning.plan",
    "WaveAttention": "wavejax.attention.wave",
    "Attention": "wavejax.attention.protocol",
    "CacheShape": "wavejax.store.shape",
    "DenseAttention": "wavejax.attention.dense",
    "WaveConfig": "wavejax.config",
    "AutoAttention": "wavejax.planning.auto",
    "WaveState": "wavejax.store.state",
    "WaveIndex": "wavejax.store.index",
    "RowStore": "wavejax.store.rows",
    "RowCache": "wavejax.store.rows",
    "SteadyZone": "wavejax.store.steady",
    "explain": "pallas_kernels",
    "use_implementation": "pallas_kernels",
    "FallbackWarning": "pallas_kernels",
    "InputError": "models.errors",
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
