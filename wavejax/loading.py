"""From a path to a model that answers: find and check it, plan its memory, read its weights."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from models.checkpoints.open import Checkpoint, find_default_model, open_checkpoint
from models.checkpoints.tensor_source import Progress
from models.errors import InputError
from models.formats import Formats
from models.rope_option import with_rope_scaling
from models.text.tokenizer import Tokenizer, load_tokenizer
from models.unstacked import unstack_layers
from wavejax.attention.protocol import Attention
from wavejax.config import WaveConfig
from wavejax.engine.generator import Generator
from wavejax.engine.sampling import Sampler
from wavejax.language_model import AttentionChoice, LanguageModel
from wavejax.planning.auto import AutoAttention
from wavejax.planning.free_memory import set_memory_limits
from wavejax.planning.plan import FetchChoice, Plan, StoreChoice, make_plan, pinned_need


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model that has been found and checked, its weights not yet read.

    Attributes:
        checkpoint: where it is, and its configuration.
        attention: settings of wave attention, `AutoAttention`, or an attention that is used as it
            is.
        dtype: of weights and caches; "auto" is float32 on a CPU, bfloat16 elsewhere.
        store: where wave attention keeps keys and values.
        fetch: how rows on the host reach the device.
        weight_dtype: of the weights' matrices; "model" is the same as `dtype`.
    """

    checkpoint: Checkpoint
    attention: AttentionChoice
    dtype: str = "auto"
    store: StoreChoice = "auto"
    fetch: FetchChoice = "auto"
    weight_dtype: str = "model"

    @functools.cached_property
    def formats(self) -> Formats:
        """The formats of the matrices that will not be floats."""
        return self.checkpoint.formats(self.weight_dtype)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises InputError where there is none."""
        return load_tokenizer(self.checkpoint.path)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end an answer: the tokenizer's and the model's.

        Those that the model has no logits for are left out: no answer can have them.
        """
        config = self.checkpoint.config
        tokens = self.tokenizer.stop_ids | set(config.stop_token_ids)
        return tuple(sorted(token for token in tokens if token < config.vocab_size))

    def set_memory_limits(self, lengths: Sequence[int], new_tokens: int) -> None:
        """Set XLA's limits for a run, if JAX's device has not been started; see `plan`."""
        # Where there is memory to pin, auto is bfloat16.
        dtype = "bfloat16" if self.dtype == "auto" else self.dtype
        shape = self.checkpoint.config, self.attention, len(lengths), max(lengths), new_tokens
        set_memory_limits(pinned_need(*shape, dtype, self.fetch))

    def plan(
        self,
        lengths: Sequence[int],
        new_tokens: int,
        sampler: Sampler | None = None,
        *,
        shortest_prompt: int | None = None,
    ) -> Plan:
        """Plans a run, and sets XLA's limits before anything starts JAX's device.

        Args:
            lengths: the tokens of each prompt.
            new_tokens: to generate.
            sampler: how tokens are drawn; None: in the way that takes most.
            shortest_prompt: as of `make_plan`; None: the shortest of these.
        """
        self.set_memory_limits(lengths, new_tokens)
        shape = self.checkpoint.config, self.attention, len(lengths), max(lengths), new_tokens
        plan = make_plan(
            *shape,
            self._dtype(),
            store=self.store,
            fetch=self.fetch,
            sampler=sampler,
            shortest_prompt=shortest_prompt or min(lengths),
            formats=self.formats,
        )
        return dataclasses.replace(plan, notes=self.checkpoint.notes(self.weight_dtype))

    def load(
        self,
        *,
        plan: Plan | None = None,
        max_context: int | None = None,
        progress: Progress | None = None,
    ) -> LanguageModel:
        """Read the weights, and keep each layer's apart where that is faster and there is room.

        Args:
            plan: of the run to come; None plans for the weights alone.
            max_context: see `load`.
            progress: see `load`.

        Raises:
            InputError: as `Checkpoint.load_params`, or there is no tokenizer.
        """
        plan = plan or self.plan([1], 1)
        config, stop_tokens = self.checkpoint.config, self.stop_tokens
        generator = Generator(config, plan.attention, stop_tokens=stop_tokens)
        params = self.checkpoint.load_params(plan.dtype, progress, self.weight_dtype)
        if unstacks(generator, plan):
            params = unstack_layers(params)
        return LanguageModel(
            path=self.checkpoint.path,
            config=config,
            params=params,
            tokenizer=self.tokenizer,
            stop_tokens=stop_tokens,
            attention=self.attention,
            store=self.store,
            fetch=self.fetch,
            max_context=max_context,
        )

    def _dtype(self) -> str:
        """Return the dtype, "auto" decided; that starts JAX's device."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def open_model(
    path: str | Path | None = None,
    *,
    dtype: str = "auto",
    attention: str | AttentionChoice = "auto",
    store: StoreChoice = "auto",
    fetch: FetchChoice = "auto",
    rope_scaling: str | None = None,
    weight_dtype: str = "auto",
) -> OpenedModel:
    """Find and check a model, reading headers only; arguments and errors as of `load`."""
    settings = attention_of(attention)
    check_placement(settings, store, fetch)
    checkpoint = open_checkpoint(find_default_model() if path is None else path)
    if rope_scaling is not None:
        config = with_rope_scaling(checkpoint.config, rope_scaling)
        checkpoint = dataclasses.replace(checkpoint, config=config)
    weights = "model" if weight_dtype == "auto" else weight_dtype
    opened = OpenedModel(checkpoint, settings, dtype, store, fetch, weights)
    opened.formats  # noqa: B018 (what the file cannot be kept in is said now)
    return opened


def load(
    path: str | Path | None = None,
    *,
    dtype: str = "auto",
    attention: str | AttentionChoice = "auto",
    store: StoreChoice = "auto",
    fetch: FetchChoice = "auto",
    rope_scaling: str | None = None,
    weight_dtype: str = "auto",
    max_context: int | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a model with its tokenizer, ready to answer.

    Call it before anything else uses JAX's device: it lets XLA take nine tenths of a GPU's memory,
    and pin the host memory that keys and values of the model's whole context take.

    Args:
        path: a Hugging Face folder, a GGUF file or a converted checkpoint. None takes the installed
            SmolLM2 package.
        dtype: of weights and caches: "bfloat16", "float16" or "float32". "auto" is float32 on a
            CPU, bfloat16 elsewhere.
        attention: "auto", of which each call takes what should be faster, or fits; "wave"; "full";
            the settings of wave attention (`WaveConfig`); or any `Attention`, which is then used
            as it is: no plan decides where its rows go.
        store: where wave attention keeps keys and values: "device", "host", or "auto", on the
            device while they fit.
        fetch: how rows on the host reach the device: "in_place", "staged", or "auto".
        rope_scaling: "yarn:FACTOR" or "linear:FACTOR", as a model's authors may advise for prompts
            past its context.
        weight_dtype: of the weights' matrices: "model", the same as `dtype`; "int8", 8 bits with a
            scale a channel; "int4", 4 bits in groups of 32, embeddings in 8; "packed", as a GGUF
            file or quantised folder has them. "auto" is "model": the rest was not timed on a GPU.
        max_context: most tokens, prompt and answer, in place of the model's own number.
        progress: called with (tensors read, tensors in all).

    Returns:
        the model; `LanguageModel.generate` and `LanguageModel.stream` answer.

    Raises:
        InputError: nothing at `path`, no model, a damaged or unsupported one; settings that
            contradict each other; no memory for the weights.

    Example:
        >>> import wavejax
        >>> model = wavejax.load()
        >>> answer = model.generate("What is the capital of France?", max_new_tokens=8)
        >>> answer.finish_reason in ("stop", "length")
        True
    """
    settings: dict[str, Any] = {"dtype": dtype, "weight_dtype": weight_dtype}
    settings |= {"store": store, "fetch": fetch, "rope_scaling": rope_scaling}
    opened = open_model(path, attention=attention, **settings)
    if max_context is not None and max_context < 1:
        raise InputError(f"`max_context` is {max_context}; it must be 1 or more")
    # Prompts come later, of any length that the model takes.
    opened.set_memory_limits([max_context or opened.checkpoint.config.max_context], 1)
    return opened.load(max_context=max_context, progress=progress)


def attention_of(choice: str | AttentionChoice) -> AttentionChoice:
    """Return settings by name, or as they are; raise InputError for another name or kind."""
    if isinstance(choice, str):
        return named_attention(choice, WaveConfig())
    if isinstance(choice, WaveConfig | AutoAttention | Attention):
        return choice
    raise _unknown(choice)


def named_attention(name: str | None, config: WaveConfig) -> AttentionChoice:
    """Return "wave", "full" or "auto" by the settings of wave attention; raise InputError else.

    None is "auto", or "wave" where a setting is not as by default. `row_dtype` is of each of them;
    the other settings are wave attention's.
    """
    if name is None:
        name = "auto" if config == WaveConfig() else "wave"
    auto = AutoAttention(config)
    named: dict[str, AttentionChoice] = {"wave": config, "full": auto.full, "auto": auto}
    if name not in named:
        raise _unknown(name)
    return named[name]


def _unknown(choice: object) -> InputError:
    return InputError(
        f"`attention` is {choice!r}; it must be 'wave', 'full', 'auto', a WaveConfig or an "
        "Attention"
    )


def check_placement(attention: AttentionChoice, store: str, fetch: str) -> None:
    """Raise InputError where `store` and `fetch` ask for what would not be done."""
    for name, value, known in (
        ("store", store, ("auto", "device", "host")),
        ("fetch", fetch, ("auto", "in_place", "staged")),
    ):
        if value not in known:
            raise InputError(f"`{name}` is {value!r}; it must be one of {', '.join(known)}")
    # Settings are no attention: a plan makes one of them.
    own = attention if isinstance(attention, Attention) else None
    if own is not None and own.has_index and (store, fetch) != ("auto", "auto"):
        name = type(attention).__name__
        raise InputError(
            f"`store` and `fetch` are the {name}'s own: leave them out, or give a WaveConfig"
        )
    if own is not None and store == "host":
        raise InputError(
            "`store='host'` is for wave attention, full attention keeps all on the device: leave "
            "it out, or give `attention='wave'`"
        )
    if own is not None and fetch != "auto":
        raise InputError(
            "`fetch` is for wave attention with rows on the host: leave it out, or give "
            "`attention='wave'`"
        )
    if store == "device" and fetch != "auto":
        raise InputError("`fetch` is for rows on the host: leave it out, or give `store='host'`")


def unstacks(generator: Generator, plan: Plan) -> bool:
    """Whether each layer gets arrays of its own: where that is faster, if there is room."""
    # While it is done there is one stack twice: with a short prompt, the most that the run takes.
    room = plan.free.device
    fits = room is None or plan.need.weights + plan.need.largest_stack <= room
    return generator.unrolls and fits
