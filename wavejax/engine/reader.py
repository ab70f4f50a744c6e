"""Reads prompts: the methods of `Generator` that make states."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import SupportsIndex

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from models.parameters import Params
from wavejax.engine import slots
from wavejax.engine.checks import MOST_INT32, as_prompts, as_sequences, whole_number
from wavejax.engine.modes import own_modes
from wavejax.engine.parts import Parts
from wavejax.engine.sampling import Sampler
from wavejax.engine.state import DecodeState
from wavejax.engine.state_checks import as_samplers, check_params, check_state


@dataclasses.dataclass(frozen=True)
class Reader(Parts):
    """What of a `Generator` reads prompts, into slots of a batch."""

    def start(
        self,
        params: Params,
        prompts: Iterable[Iterable[int]],
        max_new_tokens: SupportsIndex,
        seed: SupportsIndex = 0,
        progress: Callable[[int, int], None] | None = None,
        sequences: Iterable[int] | None = None,
        samplers: Iterable[Sampler] | None = None,
    ) -> DecodeState:
        """Read the prompts, one by one, into slots of their own: `allocate` and `insert`s.

        Prompts do not share a program run, so each gets what it would get alone.

        Args:
            params: the model's parameters, their layers stacked or unstacked; so in all methods.
            prompts: token ids, at least one each; any iterable of iterables of whole numbers.
            max_new_tokens: room to generate so many tokens each. It is rounded up
                (`prompts.answer_room`), so that requests of about as many share programs: it is for
                the caller to stop after so many.
            seed: of the sampler, an int32. Seed, a sequence's number and the step fix the noise
                with which a token is drawn: the same seed gives a prompt the same answer in the
                same place of a batch, whatever stands beside it; equal prompts in one batch get
                different ones.
            progress: called with (layers done, layers in all) as the layers of all prompts finish.
            sequences: each prompt's number for its noise, 0 or more; None numbers them 0, 1, 2, ...
                With `sequences=[3]` a prompt gets alone what it gets as the fourth of a batch.
            samplers: how each prompt's tokens are drawn; None: as the generator's `sampler` does.
                Other temperatures, shares and penalties compile nothing anew.

        Raises:
            InputError: before anything is read: there is no prompt, one is empty, a token is not
                the model's, a number is no whole one or out of range, `sequences` or
                `samplers` are not as many as prompts, or the parameters are not the model's.
        """
        prompts = as_prompts(prompts, self.model_config.vocab_size)
        new_tokens = whole_number("max_new_tokens", max_new_tokens, 0, MOST_INT32)
        seed = whole_number("seed", seed, -MOST_INT32 - 1, MOST_INT32)
        numbers = as_sequences(sequences, len(prompts))
        each = as_samplers(samplers, len(prompts), self.sampler)
        check_params(params, self.model_config)
        with own_modes():
            return self._start(params, prompts, new_tokens, seed, progress, numbers, each)

    def _start(
        self,
        params: Params,
        prompts: list[np.ndarray],
        new_tokens: int,
        seed: int,
        progress: Callable[[int, int], None] | None,
        sequences: np.ndarray,
        samplers: list[Sampler],
    ) -> DecodeState:
        dtype, layers = params["params"]["embedding"].dtype, self.model_config.num_layers
        lengths = [len(prompt) for prompt in prompts]
        sizes = len(prompts), max(lengths), new_tokens
        all_samplers = [self.sampler, *samplers]
        state = slots.allocate(self.engine, *sizes, dtype, all_samplers, min(lengths))
        for slot, prompt in enumerate(prompts):
            state = slots.insert(
                self.engine,
                params,
                state,
                slot,
                prompt,
                seed=seed,
                sequence=int(sequences[slot]),
                step=0,
                sampler=samplers[slot],
                progress=progress and _part_of(progress, slot * layers, len(prompts) * layers),
            )
        return state

    def allocate(
        self,
        batch: SupportsIndex,
        prompt_tokens: SupportsIndex,
        max_new_tokens: SupportsIndex,
        *,
        dtype: DTypeLike = "float32",
        samplers: Iterable[Sampler] = (),
        shortest_prompt: SupportsIndex = 1,
    ) -> DecodeState:
        """Make an empty state of so many slots, for `insert`; all its sequences are finished.

        Args:
            batch: slots.
            prompt_tokens: room for prompts of so many tokens; rounded up (`prompts.bucket`).
            max_new_tokens: room to generate so many tokens each; rounded up as in `start`.
            dtype: of the caches; the parameters'.
            samplers: what the slots shall be made for, besides the generator's own sampler: whether
                tokens are drawn, how many are ranked, whether penalties are counted.
            shortest_prompt: no prompt is shorter; rounded down. An index of long prompts only is
                smaller and faster: it needs no room for short ones' many clusters.

        Raises:
            InputError: a number is no whole one or out of range, or a sampler is none.
        """
        slots_wanted = whole_number("batch", batch, 1, MOST_INT32)
        longest = whole_number("prompt_tokens", prompt_tokens, 1, MOST_INT32)
        new_tokens = whole_number("max_new_tokens", max_new_tokens, 0, MOST_INT32)
        shortest = whole_number("shortest_prompt", shortest_prompt, 1, longest)
        made_for = [self.sampler, *as_samplers(samplers, None, self.sampler)]
        with own_modes():
            sizes = slots_wanted, longest, new_tokens
            return slots.allocate(self.engine, *sizes, jnp.dtype(dtype), made_for, shortest)

    def insert(
        self,
        params: Params,
        state: DecodeState,
        slot: SupportsIndex,
        prompt: Iterable[int],
        *,
        seed: SupportsIndex = 0,
        sequence: SupportsIndex | None = None,
        step: SupportsIndex = 0,
        sampler: Sampler | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> DecodeState:
        """Read a prompt into a free slot; donate `state`. Waits for what was decoded before.

        The sequence gets the tokens that it gets alone, whatever the other slots do.

        Args:
            params: the model's parameters.
            state: of `allocate` or `start`.
            slot: one that is finished: released, ended by itself, or never used.
            prompt: token ids.
            seed: of its noise, an int32.
            sequence: the number by which its noise is keyed, 0 or more; None: the slot's.
            step: how many tokens it has generated before, for its noise.
            sampler: how its tokens are drawn; None: as the generator's `sampler` does.
            progress: called with (layers done, layers in all).

        Raises:
            InputError: before anything is read: as `start` raises; the slot is none or in use; the
                prompt is too long for it, or shorter than it was made for (`shortest_prompt`; of
                `start`, a prompt of those lengths); or it was not made for such a sampler.
        """
        check_params(params, self.model_config)
        check_state(self.engine, self.sampler, state)
        tokens = as_prompts([prompt], self.model_config.vocab_size)[0]
        at = whole_number("slot", slot, 0, state.finished.shape[0] - 1)
        own = as_samplers(None if sampler is None else [sampler], 1, self.sampler)[0]
        number = at if sequence is None else sequence
        number = whole_number("a sequence's number", number, 0, MOST_INT32)
        seed = whole_number("seed", seed, -MOST_INT32 - 1, MOST_INT32)
        step = whole_number("step", step, 0, MOST_INT32)
        with own_modes():
            slots.check_insert(state, at, len(tokens), own)
            return slots.insert(
                self.engine,
                params,
                state,
                at,
                tokens,
                seed=seed,
                sequence=number,
                step=step,
                sampler=own,
                progress=progress and _part_of(progress, 0, self.model_config.num_layers),
            )

    def release(self, state: DecodeState, slot: SupportsIndex) -> DecodeState:
        """End a slot's sequence, which frees the slot; donate `state`.

        What the slot holds stays until another prompt is inserted: it costs what it did, and yields
        NO_TOKEN.

        Raises:
            InputError: the slot is none, or the state is none to go on with.
        """
        check_state(self.engine, self.sampler, state)
        at = whole_number("slot", slot, 0, state.finished.shape[0] - 1)
        with own_modes():
            return slots.release(state, at)


def _part_of(
    progress: Callable[[int, int], None], before: int, total: int
) -> Callable[[int], None]:
    """One prompt's progress as a part of all prompts'."""
    return lambda done: progress(before + done, total)
