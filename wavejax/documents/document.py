"""Documents: what a sequence has read, kept on disk, and put into a batch again."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float, Int

from models.errors import InputError
from models.parameters import Params
from models.text.tokenizer import Tokenizer
from wavejax.attention.wave import WaveAttention
from wavejax.documents import arrays
from wavejax.documents.files import Folder, read_folder, refuse_other, write_folder
from wavejax.documents.fingerprints import check_fingerprints, fingerprints, settings_of
from wavejax.documents.prefix import reusable
from wavejax.documents.restore import Restoring
from wavejax.documents.room import check_arrays, grown_tokens, shortest_prompt
from wavejax.engine import appending, slots
from wavejax.engine.checks import MOST_INT32, as_prompts, whole_number
from wavejax.engine.generator import Generator
from wavejax.engine.interface import Engine
from wavejax.engine.modes import own_modes
from wavejax.engine.sampling import Sampler
from wavejax.engine.state import DecodeState, commit
from wavejax.engine.state_checks import as_samplers, check_params, check_state


def save_document(
    state: DecodeState,
    path: str | os.PathLike[str],
    *,
    generator: Generator,
    params: Params,
    token_ids: Sequence[int] | np.ndarray,
    slot: SupportsIndex = 0,
    tokenizer: Tokenizer | None = None,
    facts: dict[str, Any] | None = None,
    weights: str | None = None,
) -> None:
    """Keep what a sequence has read: its index, steady zone, rows and token ids.

    The state stays as it is, and may be decoded from afterwards.

    Args:
        state: of `generator`, after `start` or `insert`; also after steps, whose tokens then count.
        path: a folder. An earlier document there is replaced once the new one is complete; whatever
            ends the process before, the earlier one stays whole.
        generator: what read it.
        params: the model's parameters, for their fingerprint.
        token_ids: all tokens that the sequence holds, in order.
        slot: the sequence's place in the batch.
        tokenizer: what made the token ids, for its fingerprint and its chat template's.
        facts: more to keep, plain values: `Document.facts` has them.
        weights: the fingerprint of `params`, where it is known.

    Raises:
        InputError: `token_ids` are not the tokens' number, the slot is none, something else is at
            `path`, or it cannot be written, as on a full disk.
    """
    path = Path(path)
    check_params(params, generator.model_config)
    check_state(generator.engine, generator.sampler, state)
    at = whole_number("slot", slot, 0, state.finished.shape[0] - 1)
    tokens = as_prompts([token_ids], generator.model_config.vocab_size)[0]
    refuse_other(path)
    with own_modes():
        held = int(
            generator.attention.lengths(generator.engine.arrays_of(state.attention_state))[at]
        )
        if held != len(tokens):
            raise InputError(
                f"token_ids has {len(tokens)} tokens and the sequence {held}: give the prompt's, "
                "and those that were run after it"
            )
        said = {
            "fingerprints": fingerprints(
                generator.model_config, params, generator.attention, tokenizer, weights
            ),
            "sizes": arrays.used(state.attention_state, at),
            "facts": facts or {},
        }
        small = [
            ("token_ids", lambda: tokens),
            ("logits", lambda: np.asarray(state.logits[at])),
        ]
        kept = [*small, *arrays.take(state.attention_state, at)]
        write_folder(path, said, kept)


def load_document(
    path: str | os.PathLike[str],
    *,
    generator: Generator,
    params: Params,
    tokenizer: Tokenizer | None = None,
    weights: str | None = None,
) -> "Document":
    """Open a kept document; its large arrays are read when it is put into a batch.

    Args:
        path: the folder that `save_document` wrote.
        generator: what is to go on with it: of the same model and the same settings of the index.
            Where rows are kept, and how many are retrieved, may differ.
        params: the model's parameters.
        tokenizer: None where token ids are all there is.
        weights: the fingerprint of `params`, where it is known (`fingerprints`).

    Raises:
        InputError: there is no document, it is damaged, or it was kept with another model,
            tokenizer or other settings: the message names what differs.
    """
    check_params(params, generator.model_config)
    folder = read_folder(Path(path))
    given = generator.model_config, params, generator.attention, tokenizer, weights
    now = fingerprints(*given)
    check_fingerprints(str(path), folder.facts["fingerprints"], now)
    token_ids = folder.arrays["token_ids"].read()
    return Document(folder, now, token_ids)


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A kept document, opened by `load_document`.

    Attributes:
        folder: its files.
        fingerprints: of what loaded it.
        token_ids: `[tokens]` int32, all that it has read.
    """

    folder: Folder
    fingerprints: dict[str, Any] = dataclasses.field(repr=False)
    token_ids: Int[np.ndarray, " tokens"] = dataclasses.field(repr=False)

    @property
    def facts(self) -> dict[str, Any]:
        """What `save_document` was given to keep."""
        return self.folder.facts["facts"]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.folder.nbytes

    def reused(self, prompt: Sequence[int] | np.ndarray) -> int:
        """Count the tokens of a prompt that need not be read; see `reusable`."""
        return reusable(self.token_ids, np.asarray(prompt))

    def room_of(self, prompt: Sequence[int] | np.ndarray) -> tuple[int, int]:
        """Count the room that a prompt needs: a prompt's, and, besides its answer, an answer's.

        What comes with the document goes where prompts go, the rest where answers go.
        """
        count = self.reused(prompt)
        if not count:
            return len(prompt), 0
        return count, len(prompt) - count + grown_tokens(self.folder)

    def last_logits(self) -> Float[np.ndarray, " vocab"]:
        """Return the logits of the token after the document's last one."""
        return self.folder.arrays["logits"].read()

    def restoring(
        self, engine: Engine, attention_state: object, slot: int, prompt: np.ndarray
    ) -> Restoring:
        """Begin to put what a prompt has of the document into a slot.

        Args:
            engine: of the model and the settings that the document was kept with.
            attention_state: as the engine holds it.
            slot: a free one.
            prompt: token ids, of which `reused` counts one at least.

        Raises:
            InputError: as of `Restoring`; or model or settings differ.
        """
        now = self.fingerprints | settings_of(engine.model_config, engine.attention)
        check_fingerprints(str(self.folder.path), self.folder.facts["fingerprints"], now)
        count, attention = self.reused(prompt), engine.attention
        check_arrays(self.folder, attention_state)
        length = None if count == len(self.token_ids) else count
        config = attention.config if isinstance(attention, WaveAttention) else None
        rest = len(prompt) - count
        return Restoring(self.folder, attention_state, slot, config, length, rest)

    def start(
        self,
        generator: Generator,
        max_new_tokens: SupportsIndex,
        seed: SupportsIndex = 0,
        *,
        params: Params | None = None,
        prompts: Iterable[Iterable[int]] | None = None,
        samplers: Iterable[Sampler] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> DecodeState:
        """Make a state as if prompts that begin with the document had just been read.

        `Generator.start`, but that what `reused` counts of each prompt is not read.

        Args:
            generator: as `load_document` was given, or one of another sampler or store.
            max_new_tokens: room for so many tokens more in each sequence.
            seed: of the sampler.
            params: the model's parameters, if there are prompts.
            prompts: token ids, each from its first token on; None for the document alone.
            samplers: how each prompt's tokens are drawn; None: as the generator's does.
            progress: called with (prompts done, prompts in all).

        Raises:
            InputError: as `Generator.start`; or an array is damaged.
        """
        new_tokens = whole_number("max_new_tokens", max_new_tokens, 0, MOST_INT32)
        vocab = generator.model_config.vocab_size
        given = [self.token_ids] if prompts is None else as_prompts(prompts, vocab)
        each = as_samplers(samplers, len(given), generator.sampler)
        rooms = [self.room_of(one) for one in given]
        begun = [begun for begun, _ in rooms]
        room = new_tokens + max(rest for _, rest in rooms)
        dtype = self.fingerprints["dtype"]
        sizes = len(given), max(begun), room
        state = generator.allocate(
            *sizes, dtype=dtype, samplers=each, shortest_prompt=shortest_prompt(self.folder, begun)
        )
        for slot, prompt in enumerate(given):
            more: dict[str, Any] = (
                {"params": params, "prompt": prompt} if prompts is not None else {}
            )
            state = self.insert(generator, state, slot, seed=seed, sampler=each[slot], **more)
            if progress is not None:
                progress(slot + 1, len(given))
        return state

    def insert(
        self,
        generator: Generator,
        state: DecodeState,
        slot: SupportsIndex,
        *,
        params: Params | None = None,
        prompt: Sequence[int] | np.ndarray | None = None,
        seed: SupportsIndex = 0,
        sequence: SupportsIndex | None = None,
        step: SupportsIndex = 0,
        sampler: Sampler | None = None,
    ) -> DecodeState:
        """Put the document into a free slot, as `Generator.insert` reads a prompt; donates `state`.

        Index and steady zone come first. Rows that are staged then arrive while steps go on; others
        are put in their place here. Of a prompt that leaves the document at some token, whole
        segments of the index are taken as they are, and the tokens of one that is cut are clustered
        anew. What the document has not is read, as by `Generator.append`: there must be room for it
        among the new tokens.

        Args:
            generator: as of `start`.
            state: of `Generator.allocate`, or `start`.
            slot, seed, sequence, step, sampler: as of `Generator.insert`.
            params: the model's parameters, if there is a prompt.
            prompt: token ids from the first one on; None for the document alone.

        Raises:
            InputError: as `Generator.insert`; the state has no room; or an array is damaged. Of
                these only rows that are damaged use the state up.
        """
        check_state(generator.engine, generator.sampler, state)
        at = whole_number("slot", slot, 0, state.finished.shape[0] - 1)
        own = as_samplers(None if sampler is None else [sampler], 1, generator.sampler)[0]
        number = at if sequence is None else sequence
        row = {
            "seed": whole_number("seed", seed, -MOST_INT32 - 1, MOST_INT32),
            "sequence": whole_number("a sequence's number", number, 0, MOST_INT32),
            "step": whole_number("step", step, 0, MOST_INT32),
        }
        tokens = self.token_ids
        if prompt is not None:
            check_params(params, generator.model_config)
            tokens = as_prompts([prompt], generator.model_config.vocab_size)[0]
        count = self.reused(tokens)
        if count == 0:
            return generator.insert(params, state, at, tokens.tolist(), sampler=own, **row)  # type: ignore[arg-type]
        with own_modes():
            slots.check_insert(state, at, count, own, shortest_prompt(self.folder, [count]))
            work = self.restoring(generator.engine, state.attention_state, at, tokens)
            held = state.attention_state
            try:
                while work.steps:
                    held = work.step(held)
            finally:
                work.close()
            logits = state.logits.at[at].set(self.last_logits())
            state = slots.enter(state, held, commit(logits), at, tokens[:count], sampler=own, **row)
            if count == len(tokens):
                return state
            return appending.append(generator.engine, params, state, at, tokens[count:])  # type: ignore[arg-type]
