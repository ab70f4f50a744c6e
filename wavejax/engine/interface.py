"""The interface of engines: what runs a model's layers over prompts and in decode steps."""

import abc
import dataclasses
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from models.config import ModelConfig
from models.parameters import Params
from wavejax.attention.protocol import AnyAttention
from wavejax.engine.state import DecodeState

# An int32 scalar. A compiled call takes the host's along, for which an array of its own is a
# transfer and a kernel: some 0.3 ms on a GPU machine.
Number = Int[Array, ""] | np.int32


@dataclasses.dataclass(frozen=True)
class Engine(abc.ABC):
    """Runs a model with an attention; `engine_of` picks one.

    Hashable and static in `jit`: equal engines share their compiled programs. The order of calls:

    1. `hold`: once, with the empty attention state.
    2. `prefill_layer`: for each prompt, layer by layer, from the first one on.
    3. `finish_prefill`: after a prompt's last layer.
    4. `decode_n`, `force`, `feed`: any of them, any number of times.

    States and the arrays they hold are donated: the one that a call returns takes their place.

    Attributes:
        model_config: the model's configuration.
        attention: of all layers.
        stop_tokens: a sequence ends after any of these.
        unroll: write all layers out in the compiled step; None does on GPUs.
    """

    model_config: ModelConfig
    attention: AnyAttention
    stop_tokens: tuple[int, ...] = ()
    unroll: bool | None = None

    @property
    def unrolls(self) -> bool:
        """Whether the compiled step writes all layers out: then unstacked ones are faster."""
        return jax.default_backend() == "gpu" if self.unroll is None else self.unroll

    @abc.abstractmethod
    def hold(self, empty: Any) -> Any:
        """Return the attention state as this engine holds it, of an empty one from `init_state`."""

    @abc.abstractmethod
    def holds(self, attention_state: Any) -> bool:
        """Whether an attention state is such as `hold` returns."""

    @abc.abstractmethod
    def arrays_of(self, attention_state: Any) -> Any:
        """Return what of a held attention state the attention's own methods take.

        It is all that is a pytree.
        """

    @abc.abstractmethod
    def prefill_layer(
        self,
        params: Params,
        hidden: Float[Array, "1 tokens hidden"],
        layer: Number,
        sequence: Number,
        length: Number,
        attention_state: Any,
    ) -> tuple[Float[Array, "1 tokens hidden"], Any]:
        """Run one layer over a padded prompt.

        Args:
            params: at least the layer's, as `unstacked.only_layer` gives them.
            hidden: the layer's input.
            layer: its number.
            sequence: where in the batch the prompt goes.
            length: the prompt's tokens, padding not counted.
            attention_state: as held; donated.

        Returns:
            the layer's output, and the attention state.
        """

    @abc.abstractmethod
    def finish_prefill(
        self,
        params: Params,
        hidden: Float[Array, "1 tokens hidden"],
        sequence: Number,
        length: Number,
        attention_state: Any,
        logits: Float[Array, "batch vocab"],
    ) -> tuple[Any, Float[Array, "batch vocab"]]:
        """End a prompt's reading: set the sequence's lengths and its row of the logits.

        Args:
            params: those that are no layer's.
            hidden: the last layer's output.
            sequence: as of `prefill_layer`.
            length: as of `prefill_layer`.
            attention_state: as held; donated.
            logits: of the batch; donated.

        Returns:
            the attention state, and the logits.
        """

    @property
    def draws_ahead(self) -> bool:
        """Whether there is `first_tokens`, and `decode_n` takes what it gives."""
        return False

    def first_tokens(
        self, state: DecodeState
    ) -> tuple[Int[Array, " batch"], Int[Array, "1 batch"]]:
        """Draw the tokens of the next step ahead of it, so that nobody waits for the step.

        Returns:
            the tokens that `decode_n` is to be given as `first`, and those to show, as its first
            row. The state is not donated.
        """
        raise NotImplementedError(f"{type(self).__name__} draws no tokens ahead of a step")

    @abc.abstractmethod
    def decode_n(
        self,
        params: Params,
        state: DecodeState,
        steps: int,
        first: Int[Array, " batch"] | None = None,
    ) -> tuple[DecodeState, Int[Array, "steps batch"]]:
        """Draws and feeds `steps` tokens a sequence; see `Generator.decode_n`.

        `first` are the first step's tokens, drawn by `first_tokens`.
        """

    @abc.abstractmethod
    def force(
        self, params: Params, state: DecodeState, tokens: Int[Array, "steps batch"]
    ) -> tuple[DecodeState, Float[Array, "steps batch vocab"]]:
        """Feed given tokens and keep the logits; see `Generator.force`."""

    @abc.abstractmethod
    def feed(self, params: Params, state: DecodeState, tokens: Int[Array, " batch"]) -> DecodeState:
        """Run one given token of each sequence; see `Generator.feed`."""
