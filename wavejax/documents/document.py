"""Documents: what a sequence has read, kept on disk, and put into a batch again."""

import concurrent.futures
import dataclasses
import os
from pathlib import Path
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from models.errors import InputError
from models.parameters import Params
from models.text.tokenizer import Tokenizer
from wavejax.documents import arrays
from wavejax.documents.arriving_rows import ArrivingRows
from wavejax.documents.files import Folder, StoredArray, read_folder, refuse_other, write_folder
from wavejax.documents.fingerprints import check_fingerprints, fingerprints, settings_of
from wavejax.engine import slots
from wavejax.engine.checks import MOST_INT32, as_prompts, whole_number
from wavejax.engine.generator import Generator
from wavejax.engine.modes import own_modes
from wavejax.engine.sampling import Sampler
from wavejax.engine.staged_state import StagedState
from wavejax.engine.state import DecodeState, commit
from wavejax.engine.state_checks import as_samplers, check_params, check_state
from wavejax.store.state import WaveState

_AHEAD = 2  # Layers whose files are read and checked while an earlier one is put in its place.


def save_document(
    state: DecodeState,
    path: str | os.PathLike[str],
    *,
    generator: Generator,
    params: Params,
    token_ids: Any,
    slot: SupportsIndex = 0,
    tokenizer: Tokenizer | None = None,
    facts: dict[str, Any] | None = None,
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
                generator.model_config, params, generator.attention, tokenizer
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
) -> "Document":
    """Open a kept document; its large arrays are read when it is put into a batch.

    Args:
        path: the folder that `save_document` wrote.
        generator: what is to go on with it: of the same model and the same settings of the index.
            Where rows are kept, and how many are retrieved, may differ.
        params: the model's parameters.
        tokenizer: None where token ids are all there is.

    Raises:
        InputError: there is no document, it is damaged, or it was kept with another model,
            tokenizer or other settings: the message names what differs.
    """
    check_params(params, generator.model_config)
    folder = read_folder(Path(path))
    now = fingerprints(generator.model_config, params, generator.attention, tokenizer)
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

    def start(
        self,
        generator: Generator,
        max_new_tokens: SupportsIndex,
        seed: SupportsIndex = 0,
        *,
        sampler: Sampler | None = None,
    ) -> DecodeState:
        """Make a state as if the document had just been read: `Generator.start` without reading.

        Args:
            generator: as `load_document` was given, or one of another sampler or store.
            max_new_tokens: room for so many tokens more, questions and answers.
            seed: of the sampler.
            sampler: how its tokens are drawn; None: as the generator's does.

        Raises:
            InputError: a number is out of range, or an array is damaged.
        """
        new_tokens = whole_number("max_new_tokens", max_new_tokens, 0, MOST_INT32)
        state = self.allocate(generator, 1, new_tokens, [sampler] if sampler else [])
        return self.insert(generator, state, 0, seed=seed, sampler=sampler)

    def allocate(
        self, generator: Generator, batch: int, max_new_tokens: int, samplers: list[Sampler]
    ) -> DecodeState:
        """Make an empty state that has room for the document in each slot."""
        # What grew after the prompt took room of its own, and takes it again.
        grown = self._grown(generator)
        return generator.allocate(
            batch,
            len(self.token_ids),
            max_new_tokens + grown,
            dtype=self.fingerprints["dtype"],
            samplers=samplers,
        )

    def insert(
        self,
        generator: Generator,
        state: DecodeState,
        slot: SupportsIndex,
        *,
        seed: SupportsIndex = 0,
        sequence: SupportsIndex | None = None,
        step: SupportsIndex = 0,
        sampler: Sampler | None = None,
    ) -> DecodeState:
        """Put the document into a free slot, as `Generator.insert` reads a prompt; donates `state`.

        Index and steady zone come first. Rows that are staged then arrive while steps go on; others
        are put in their place here.

        Raises:
            InputError: as `Generator.insert`; the state has no room; or an array is damaged. The
                state is then used up.
        """
        check_state(generator.engine, generator.sampler, state)
        at = whole_number("slot", slot, 0, state.finished.shape[0] - 1)
        own = as_samplers(None if sampler is None else [sampler], 1, generator.sampler)[0]
        row = {
            "seed": whole_number("seed", seed, -MOST_INT32 - 1, MOST_INT32),
            "sequence": whole_number(
                "a sequence's number", at if sequence is None else sequence, 0, MOST_INT32
            ),
            "step": whole_number("step", step, 0, MOST_INT32),
        }
        now = self.fingerprints | settings_of(generator.model_config, generator.attention)
        check_fingerprints(str(self.folder.path), self.folder.facts["fingerprints"], now)
        with own_modes():
            slots.check_insert(state, at, len(self.token_ids), own)
            self._check_room(state.attention_state)
            attention_state = self._restore(state.attention_state, at)
            logits = state.logits.at[at].set(self.folder.arrays["logits"].read())
            return slots.enter(
                state, attention_state, commit(logits), at, self.token_ids, sampler=own, **row
            )

    def _grown(self, generator: Generator) -> int:
        sizes = self.folder.facts["sizes"]
        if "index/prompt_tokens" not in self.folder.arrays:
            return 0
        prompt = int(self.folder.arrays["index/prompt_tokens"].read())
        return int(sizes["tokens"]) - prompt

    def _check_room(self, attention_state: Any) -> None:
        for part in arrays.parts_of(attention_state):
            name = f"{part.name}/0" if part.by_layer else part.name
            stored = self.folder.arrays.get(name)
            if stored is None:
                raise InputError(
                    f"{self.folder.path} has no {name}: it was kept with other settings; read the "
                    "document again"
                )
            if not arrays.fits(part, stored.shape, part.by_layer):
                raise InputError(
                    f"the state has no room for the document of {len(self.token_ids)} tokens: make "
                    "it with the document's `allocate`"
                )

    def _restore(self, attention_state: Any, slot: int) -> Any:
        """The attention's state with the document in a slot; donated."""
        staged = isinstance(attention_state, StagedState)
        state = attention_state.wave if staged else attention_state
        parts = {part.name: part for part in arrays.parts_of(attention_state)}
        new: dict[str, Any] = {}
        for name, part in parts.items():
            if not part.by_layer:
                new[name] = arrays.put(part, slot, self.folder.arrays[name].read())
        for name, part in parts.items():
            if not part.by_layer:
                continue
            files = [self.folder.arrays[f"{name}/{layer}"] for layer in range(part.array.shape[0])]
            if staged:
                rows = ArrivingRows(attention_state.rows)
                rows.receive(slot, files)
            else:
                new[name] = _put_layers(part, slot, files)
        paths, tree = jax.tree_util.tree_flatten_with_path(state)
        leaves = [new.get("/".join(key.name for key in path), leaf) for path, leaf in paths]
        state = jax.tree.unflatten(tree, leaves)
        if isinstance(state, WaveState):
            state = arrays.begin(state, jnp.int32(slot))
        return StagedState(state, rows) if staged else state


def _put_layers(part: arrays.Part, slot: int, files: list[StoredArray]) -> Any:
    """Put the rows of all layers into a slot; the next layers' files are checked meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(_AHEAD) as pool:
        coming = [pool.submit(file.read) for file in files]
        for layer, rows in enumerate(coming):
            part = part._replace(array=arrays.put(part, slot, rows.result(), layer))
    return part.array
