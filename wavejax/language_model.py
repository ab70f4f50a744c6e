"""A model from text to text: what `wavejax.load` returns."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import jax
from jaxtyping import Array, Float, Int

from models.config import ModelConfig
from models.decoder import Attend, Decoder, State
from models.errors import InputError
from models.parameters import Params
from models.quantised import formats_of
from models.text.tokenizer import Tokenizer
from models.unstacked import stack_layers
from wavejax.attention.causal import causal_attention
from wavejax.attention.protocol import AnyAttention
from wavejax.config import WaveConfig
from wavejax.engine.checks import MOST_INT32, whole_number
from wavejax.engine.generator import Generator
from wavejax.engine.model_sampling import check_samples, model_sampling
from wavejax.engine.options import PromptOptions, StreamOptions
from wavejax.engine.prompt_text import (
    EncodedPrompt,
    Prompt,
    check_lengths,
    encode_prompt,
    list_prompts,
)
from wavejax.engine.sampling import Sampler
from wavejax.engine.text import Generation, TextPiece, TextRun, TextStream
from wavejax.planning.auto import AutoAttention
from wavejax.planning.free_memory import free_besides
from wavejax.planning.plan import FetchChoice, Plan, StoreChoice, make_plan

AttentionChoice = WaveConfig | AutoAttention | AnyAttention
MOST_SAMPLES = 65536


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model with its tokenizer; `wavejax.load` makes it.

    Every call plans anew where keys and values go, by its prompts and the memory that is free.
    Calls of like lengths share compiled programs.

    Attributes:
        path: the file or folder that holds the model.
        config: its sizes and variations.
        params: its parameters; their layers are stacked, or apart where that is faster.
        tokenizer: text to token ids and back.
        stop_tokens: an answer ends after any of these.
        attention: the settings of wave attention; `AutoAttention`, of which each call's plan makes
            wave or full attention; or any attention, which is used as it is.
        store: where wave attention keeps keys and values: "auto", "device" or "host".
        fetch: how rows on the host reach the device: "auto", "in_place" or "staged".
        max_context: most tokens, prompt and answer; None as `config` has it.
    """

    path: Path
    config: ModelConfig
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    attention: AttentionChoice = dataclasses.field(default_factory=WaveConfig)
    store: StoreChoice = "auto"
    fetch: FetchChoice = "auto"
    max_context: int | None = None

    @property
    def dtype(self) -> str:
        """Of parameters and caches."""
        return self.params["params"]["embedding"].dtype.name

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int = 256,
        **options: Unpack[StreamOptions],
    ) -> Generation:
        """Answer a prompt, or a batch of prompts, and return when all is done.

        Args:
            prompt: a text; a conversation, `[{"role": "user", "content": text}, ...]`; or a list of
                these, a batch. A text is a message to a model that knows chat, and is continued by
                any other.
            max_new_tokens: an answer ends after this number of tokens.
            options: as of `stream`.

        Returns:
            the answers. `text`, `token_ids` and `finish_reason` are the first answer's.

        Raises:
            InputError: as of `stream`.

        Example:
            >>> import wavejax
            >>> model = wavejax.load(attention="full")
            >>> talk = [{"role": "user", "content": "Name a colour."}]
            >>> result = model.generate([talk, "Name a city."], max_new_tokens=4)
            >>> [len(answer.token_ids) <= 4 for answer in result.answers]
            [True, True]
        """
        stream = self.stream(prompt, max_new_tokens, **options)
        for _ in stream:
            pass
        return stream.result()

    def stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int = 256,
        *,
        sampler: Sampler | Literal["model"] | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        samples: int = 1,
        raw: bool | None = None,
        system: str | None = None,
        template_args: Mapping[str, object] | None = None,
        control_tokens: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> TextStream:
        """Answer a prompt, or a batch of prompts, piece by piece.

        Everything is checked at the call. The prompts are read when the first piece is asked for.

        Args:
            prompt: as of `generate`.
            max_new_tokens: an answer ends after this number of tokens.
            sampler: how tokens are drawn. None takes the most probable; "model" takes the values
                of the model's generation_config.json.
            seed: fixes the noise of each answer, by its place in the batch and its step.
            stop: texts that end an answer before they begin.
            samples: answers of each prompt, side by side in one batch.
            raw: whether a text is continued as it is; None: if the model knows no chat.
            system: a system message before each prompt.
            template_args: variables of the chat template, such as `{"enable_thinking": False}`.
            control_tokens: whether control tokens that a prompt spells out count as such.
            progress: called with (layers done, layers in all) as the prompts are read.

        Returns:
            an iterator of `TextPiece`, one for each token of each answer. Its `result()` is the
            `Generation`, as far as it has come.

        Raises:
            InputError: a parameter is none that can be used, a prompt is too long for the model, or
                there is no memory for the run.

        Example:
            >>> import wavejax
            >>> stream = wavejax.load().stream("Hello", max_new_tokens=3)
            >>> text = "".join(piece.text for piece in stream)
            >>> text == stream.result().text
            True
        """
        new_tokens = whole_number("max_new_tokens", max_new_tokens, 1, MOST_INT32)
        samples = whole_number("samples", samples, 1, MOST_SAMPLES)
        seed = whole_number("seed", seed, -MOST_INT32 - 1, MOST_INT32)
        chosen = self.sampler(sampler)
        check_samples(samples, chosen)
        encoded = self.encode(
            prompt,
            raw=raw,
            system=system,
            template_args=template_args,
            control_tokens=control_tokens,
        )
        ids = [one.ids for one in encoded]
        check_lengths(self.config, ids, new_tokens, self.max_context)
        lengths = [*map(len, ids)]
        more = {"batch": len(ids) * samples, "shortest_prompt": min(lengths)}
        generator = self.generator(max(lengths), new_tokens, sampler=chosen, **more)
        stops = (stop,) if isinstance(stop, str) else stop
        run = TextRun(generator, self.tokenizer, encoded, samples, stops)

        def pieces() -> Iterator[TextPiece]:
            run.start(self.params, new_tokens, seed, progress)
            yield from run.pieces(self.params, new_tokens)

        return TextStream(run, pieces())

    def encode(
        self, prompt: Prompt | Sequence[Prompt], **options: Unpack[PromptOptions]
    ) -> list[EncodedPrompt]:
        """Token ids of a prompt or a batch, as `generate` reads them.

        Args:
            prompt: as of `generate`.
            options: `raw`, `system`, `template_args` and `control_tokens`, as of `stream`.

        Raises:
            InputError: as of `generate`.
        """
        return [encode_prompt(self.tokenizer, one, **options) for one in list_prompts(prompt)]

    def sampler(self, choice: Sampler | Literal["model"] | None = None) -> Sampler:
        """Return the sampler of a name: None is greedy, "model" as generation_config.json has it.

        Raises:
            InputError: another name or kind, or the model states no values.
        """
        if choice is None:
            return Sampler()
        if isinstance(choice, Sampler):
            return choice
        if choice == "model":
            return Sampler(**model_sampling(self.path))
        raise InputError(f"`sampler` is {choice!r}; it must be a Sampler, 'model' or None")

    def plan(
        self,
        prompt_tokens: int,
        max_new_tokens: int,
        batch: int = 1,
        sampler: Sampler | None = None,
        *,
        shortest_prompt: int = 1,
    ) -> Plan:
        """Where the keys and values of a run would go, and what it takes of memory.

        Args:
            prompt_tokens: of the longest prompt.
            max_new_tokens: to generate.
            batch: sequences.
            sampler: how tokens are drawn; None: in the way that takes most.
            shortest_prompt: tokens of the shortest one.
        """
        asked = self.attention, batch, prompt_tokens, max_new_tokens, self.dtype
        more: dict[str, Any] = {"store": self.store, "fetch": self.fetch, "sampler": sampler}
        more |= {"free": free_besides(self.params), "shortest_prompt": shortest_prompt}
        return make_plan(self.config, *asked, **more, formats=formats_of(self.params))

    def generator(
        self,
        prompt_tokens: int,
        max_new_tokens: int,
        *,
        batch: int = 1,
        sampler: Sampler | None = None,
        shortest_prompt: int = 1,
    ) -> Generator:
        """Return the generator of a run, for work on tokens and logits; arguments as of `plan`.

        Raises:
            InputError: there is no memory for the run.
        """
        sampler = sampler or Sampler()
        sizes = prompt_tokens, max_new_tokens, batch, sampler
        plan = self.plan(*sizes, shortest_prompt=shortest_prompt)
        plan.check()
        return Generator(self.config, plan.attention, sampler, self.stop_tokens)

    def flax(self, attend: Attend | None = None) -> tuple[Decoder, Params]:
        """Return the model as a Flax module, and its variables.

        `module.apply(variables, tokens, positions, state)` gives the hidden states after the final
        norm, `[batch, tokens, hidden]`, and the attention's state; `models.decoder.unembed(config,
        variables, hidden)` gives logits.

        Args:
            attend: the attention (`models.decoder.Attend`). None is causal attention among the
                tokens that are given; its state is None.

        Returns:
            the module, and `{"params": ...}` with layers stacked: a copy of the weights where this
            model keeps its layers apart.

        Example:
            >>> import jax.numpy as jnp, wavejax
            >>> module, variables = wavejax.load().flax()
            >>> tokens = jnp.array([[1, 2, 3]])
            >>> hidden, _ = module.apply(variables, tokens, jnp.arange(3)[None], None)
            >>> hidden.shape == (1, 3, module.config.hidden_size)
            True
        """
        return Decoder(self.config, attend or causal_attend), stack_layers(self.params)


def causal_attend(
    layer: Int[Array, ""],
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens kv_heads head_dim"],
    value: Float[Array, "batch tokens kv_heads head_dim"],
    state: State,
) -> tuple[Float[Array, "batch tokens heads head_dim"], State]:
    """Causal attention among the tokens given, for `Decoder`; hands `state` on as it is."""
    del layer
    scale = 1.0 / math.sqrt(query.shape[-1])
    return jax.vmap(functools.partial(causal_attention, scale=scale))(query, key, value), state
