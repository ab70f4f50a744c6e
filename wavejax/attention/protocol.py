"""The interface of an attention: what a decoder calls, and in which order."""

import abc
import math
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Implementation
from wavejax.attention.causal import causal_attention
from wavejax.attention.footprint import Footprint, plain_footprint
from wavejax.store.rows import StoreKind
from wavejax.store.shape import CacheShape

State = TypeVar("State")

# The operands of a layer, after RoPE. One layer's number, one sequence's prompt, a batch's step.
Layer = Int[Array, ""]
PromptQuery = Float[Array, "1 tokens heads head_dim"]
PromptKV = Float[Array, "1 tokens kv_heads head_dim"]
PromptTokenKV = Float[Array, "tokens kv_heads head_dim"]
StepQuery = Float[Array, "batch 1 heads head_dim"]
StepKV = Float[Array, "batch 1 kv_heads head_dim"]


class Counts(NamedTuple):
    """What decode steps have read so far, over all layers, sequences and kv heads.

    Attributes:
        retrieved: KV rows that were retrieved.
        hits: of these, the KV rows that the row cache held; None without a row cache.
        attended: KV rows that full attention would have read.
        indexed: tokens in the index now, over all sequences.
        errors: float32, true relative errors of the heads that an audit computed exactly; None
            without an audit.
        tolerance: of all query heads, the shares that were within the tolerance at once, after
            more tokens, by exact computation, and never; None without a tolerance or a step.
    """

    retrieved: int
    hits: int | None
    attended: float
    indexed: int
    errors: np.ndarray | None = None
    tolerance: tuple[float, float, float, float] | None = None


class Attention(abc.ABC, Generic[State]):
    """An attention over a KV cache of its own: `WaveAttention`, `DenseAttention`, or yours.

    An attention holds settings and no arrays. It must be hashable, as a frozen dataclass is: it is
    a static argument of compiled functions. `State`, its KV cache, is a pytree. The methods are
    pure functions of it; a state is meant to be donated, and used once.

    The order of calls:

    1. `init_state` once: an empty state.
    2. `prefill` for each layer of a sequence's prompt, then
    3. `finish_prefill` once for that sequence. Sequences may follow one another in any order; a
       prompt replaces what its sequence held.
    4. `grow` once, at the beginning of each decode step.
    5. `lengths` once: the positions of the step's tokens, for RoPE.
    6. `decode` for each layer.
    7. `advance` once, at the end of the step. Then 4 again.

    `remaining` and `is_full` may be asked between steps: a sequence that is full must not be
    active in the next one.

    The other members have defaults, which are right for an attention that keeps all keys and
    values on the device and attends to all of them. `Generator`, the planner and the facts ask
    nothing else, and no attention by its class.
    """

    @abc.abstractmethod
    def init_state(
        self,
        shape: CacheShape,
        batch: int,
        prompt_tokens: int,
        new_tokens: int,
        dtype: DTypeLike,
        *,
        shortest_prompt: int = 1,
    ) -> State:
        """Make an empty state.

        Args:
            shape: the layers and heads; `CacheShape.of(model_config)` of a model of this library.
            batch: sequences.
            prompt_tokens: room for prompts of this many tokens, padding included.
            new_tokens: room for this many tokens more.
            dtype: of keys and values.
            shortest_prompt: no prompt is shorter; what only shorter ones need may be left out.
        """

    def prefill(
        self,
        layer: Layer,
        query: PromptQuery,
        key: PromptKV,
        value: PromptKV,
        state: State,
        *,
        sequence: Int[Array, ""],
        length: Int[Array, ""],
    ) -> tuple[PromptQuery, State]:
        """Attend to a prompt, exactly, and write its cache, in one layer.

        Args:
            layer: int32, which layer.
            query, key, value: the prompt's, after RoPE, padded past `length`.
            state: before this layer.
            sequence: int32, whose cache to write.
            length: int32, the prompt's tokens.

        Returns:
            the layer's output, anything past `length`, and the state.
        """
        output = causal_attention(query[0], key[0], value[0], scale=scale_of(query))[None]
        state = self.write_prompt(layer, key[0], value[0], state, sequence=sequence, length=length)
        return output, state

    @abc.abstractmethod
    def write_prompt(
        self,
        layer: Layer,
        key: PromptTokenKV,
        value: PromptTokenKV,
        state: State,
        *,
        sequence: Int[Array, ""],
        length: Int[Array, ""],
    ) -> State:
        """Write a prompt's cache in one layer: `prefill` without the output. Moves no length.

        Args:
            layer: int32, which layer.
            key, value: the prompt's, after RoPE, padded past `length`.
            state: before this layer.
            sequence: int32, whose cache to write.
            length: int32, the prompt's tokens.
        """

    @abc.abstractmethod
    def finish_prefill(
        self, state: State, sequence: Int[Array, ""], length: Int[Array, ""]
    ) -> State:
        """Set a sequence's length, after all layers have been prefilled.

        Args:
            state: after the last layer's `prefill`.
            sequence: int32, whose.
            length: int32, the prompt's tokens.
        """

    def grow(self, state: State) -> State:
        """Make room for the step's tokens. By default there is nothing to do."""
        return state

    @abc.abstractmethod
    def lengths(self, state: State) -> Int[Array, " batch"]:
        """Count the tokens that each sequence holds: int32; the position of its next token."""

    @abc.abstractmethod
    def decode(
        self, layer: Layer, query: StepQuery, key: StepKV, value: StepKV, state: State
    ) -> tuple[StepQuery, State]:
        """Take one token of every sequence in, and attend to all it has, in one layer.

        Args:
            layer: int32, which layer.
            query, key, value: the tokens', after RoPE.
            state: before this layer; `grow` came before the first one.

        Returns:
            the layer's output, in the query's dtype, and the state.
        """

    @abc.abstractmethod
    def advance(self, state: State, active: Bool[Array, " batch"]) -> State:
        """Count the step's tokens in, after the last layer.

        Args:
            state: after the last layer's `decode`.
            active: a sequence that is not keeps its length, and its token is forgotten.
        """

    @abc.abstractmethod
    def remaining(self, state: State) -> Int[Array, " batch"]:
        """Count the tokens that each sequence has room for yet: int32."""

    def is_full(self, state: State) -> Bool[Array, " batch"]:
        """Say which sequences have no room for another token."""
        return self.remaining(state) <= 0

    def counts(self, state: State) -> Counts | None:
        """Read what decode steps have read so far; waits for the work that makes the state.

        Returns:
            the numbers; None, the default, where every token is attended to exactly.
        """
        return None

    def footprint(
        self, state: State, shape: CacheShape, heads: int, prompt_tokens: int, dtype: DTypeLike
    ) -> Footprint:
        """Count the bytes that the state holds, and that one layer's work takes besides.

        The planner asks it. The default takes all arrays of the state for keys and values.

        Args:
            state: arrays, or their shapes, as `on_device.init_state` makes them.
            shape: the layers and heads of the cache.
            heads: query heads.
            prompt_tokens: of the longest prompt, padding included.
            dtype: of the model's keys and values, as `init_state` is given it.
        """
        return plain_footprint(state, shape, heads, prompt_tokens, dtype)

    @property
    def on_device(self) -> "Attention[State]":
        """The same attention with all of its state on the device: of the same sizes."""
        return self

    @property
    def state_type(self) -> type[object]:
        """The class of the states that `init_state` makes; any by default."""
        return object

    @property
    def implementation(self) -> Implementation | None:
        """How the ops run; None leaves it to the context manager and the variable."""
        return None

    @property
    def store(self) -> StoreKind:
        """Where KV rows are: "device", the default, or "host"."""
        return "device"

    @property
    def row_dtype(self) -> str:
        """What keys and values are kept in: "model", the default, or "int8"."""
        return "model"

    @property
    def has_index(self) -> bool:
        """Whether the state has an index, which estimates what is not retrieved."""
        return False

    @property
    def has_cache(self) -> bool:
        """Whether the state has a row cache."""
        return False

    @property
    def cache_fraction(self) -> float:
        """The row cache's slots as a share of the tokens; 0 without an index."""
        return 0.0

    @property
    def staged(self) -> bool:
        """Whether `Generator` holds the KV rows, and brings them from layer to layer.

        Its engine calls more than this interface has: such an attention is a `WaveAttention`.
        """
        return False


# For what takes any of them: the kind of its state is its own matter.
AnyAttention = Attention[Any]


def scale_of(query: jax.Array) -> float:
    """Return what multiplies every product of query and key: 1 / sqrt(head_dim)."""
    return 1.0 / math.sqrt(query.shape[-1])
