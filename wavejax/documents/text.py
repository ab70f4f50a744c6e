"""Documents as text: one is read and kept, then asked; a question costs its own tokens."""

import dataclasses
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from models.errors import InputError
from models.parameters import Params
from models.text.conversation import read_messages
from models.text.tokenizer import Tokenizer
from wavejax.attention.dense import DenseAttention
from wavejax.documents.document import Document, load_document, save_document
from wavejax.documents.files import Folder, read_folder, refuse_other
from wavejax.documents.fingerprints import weights_fingerprint
from wavejax.documents.room import shortest_prompt
from wavejax.engine.checks import MOST_INT32, whole_number
from wavejax.engine.generator import Generator
from wavejax.engine.model_sampling import check_samples
from wavejax.engine.prompt_text import EncodedPrompt, Message, check_lengths, encode_prompt
from wavejax.engine.prompts import common_prefix
from wavejax.engine.sampling import Sampler
from wavejax.engine.state import DecodeState
from wavejax.engine.text import TextRun, TextStream
from wavejax.language_model import MOST_SAMPLES, AttentionChoice, LanguageModel
from wavejax.planning.auto import AutoAttention

_BETWEEN = "\n\n"  # Between a document and a question, in one message.
_ANY_QUESTIONS = ("A", "1", " ", "\n")  # They have no beginning in common.
_weights: weakref.WeakKeyDictionary[LanguageModel, str] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class DocumentText:
    """A document's text, and how a prompt is made of it and a question.

    Attributes:
        text: the document's.
        raw: whether a question continues the text as it is; else both are one message of a chat.
        system: a system message before it.
        template_args: variables of the chat template.
        control_tokens: whether control tokens that the text spells out count as such.
    """

    text: str
    raw: bool
    system: str | None = None
    template_args: Mapping[str, object] | None = None
    control_tokens: bool = False

    def prompt(self, tokenizer: Tokenizer, question: str) -> EncodedPrompt:
        """Token ids of the document and a question; raises InputError as `encode_prompt` does."""
        if not question.strip():
            raise InputError("the question is empty: give a text")
        return self._encode(tokenizer, question)

    def conversation(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        template_args: Mapping[str, object] | None = None,
    ) -> EncodedPrompt:
        """Token ids of a conversation about the document, which its first message follows.

        Args:
            tokenizer: the model's.
            messages: the first one a user's; with one message this is `prompt`.
            template_args: variables of the chat template, besides the document's own.

        Raises:
            InputError: the first message is no text of a user's, or as of `encode_prompt`.
        """
        first, *rest = read_messages(messages)
        question = first["content"]
        if first["role"] != "user" or not (question or "").strip():
            raise InputError(
                "the conversation about a document begins with no question: give a user's message "
                "first"
            )
        return encode_prompt(
            tokenizer,
            [{**first, "content": f"{self.text}{_BETWEEN}{question}"}, *rest],
            system=self.system,
            template_args={**(self.template_args or {}), **(template_args or {})},
            control_tokens=self.control_tokens,
        )

    def prefix(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids that the document's prompts begin with, whatever the question."""
        first, *others = (
            np.asarray(self._encode(tokenizer, question).ids) for question in _ANY_QUESTIONS
        )
        return first[: min(common_prefix(first, other) for other in others)].tolist()

    @classmethod
    def of(cls, folder: Folder) -> "DocumentText":
        """Read the text that a folder keeps; raises InputError where it keeps tokens alone."""
        said = folder.facts["facts"].get("text")
        if said is None:
            raise InputError(
                f"{folder.path} was kept of tokens, not of a text: give the whole prompt as tokens "
                "to `load_document(...).start`"
            )
        return cls(**said)

    def _encode(self, tokenizer: Tokenizer, question: str) -> EncodedPrompt:
        given = {
            "raw": self.raw,
            "system": self.system,
            "template_args": self.template_args,
            "control_tokens": self.control_tokens,
        }
        between = "" if self.raw else _BETWEEN
        return encode_prompt(tokenizer, f"{self.text}{between}{question}", **given)  # type: ignore[arg-type]


class Asked:
    """Questions to a kept document, encoded: what is reused, and what room a run needs.

    Args:
        path: the document's folder.
        tokenizer: the model's.
        questions: one or more.

    Raises:
        InputError: there is no document of a text, or a question is empty.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, questions: Sequence[str]):
        folder = read_folder(path)
        text = DocumentText.of(folder)
        self.path, self.tokenizer = path, tokenizer
        self.prompts = [text.prompt(tokenizer, question) for question in questions]
        self.ids = [prompt.ids for prompt in self.prompts]
        # Of what is on disk, before anything is compared; for the plan.
        document = Document(folder, {}, folder.arrays["token_ids"].read())
        self.reused = [document.reused(ids) for ids in self.ids]
        self.shortest_prompt = shortest_prompt(folder, [max(1, one) for one in self.reused])

    def lengths(self, new_tokens: int) -> tuple[list[int], int]:
        """Count the prompts' tokens that come with the document, and the room after them."""
        rest = max(len(ids) - reused for ids, reused in zip(self.ids, self.reused, strict=True))
        return [max(1, reused) for reused in self.reused], new_tokens + rest

    def reader(
        self, generator: Generator, weights: str | None = None
    ) -> Callable[..., DecodeState]:
        """Make what `TextRun` starts with, in place of `Generator.start`."""

        def read(
            params: Params,
            ids: Sequence[list[int]],
            new_tokens: int,
            seed: int,
            progress: Callable[[int, int], None] | None = None,
        ) -> DecodeState:
            document = load_document(
                self.path,
                generator=generator,
                params=params,
                tokenizer=self.tokenizer,
                weights=weights,
            )
            return document.start(
                generator, new_tokens, seed, params=params, prompts=ids, progress=progress
            )

        return read


def read_document(
    model: LanguageModel,
    text: str,
    path: str | os.PathLike[str],
    *,
    raw: bool | None = None,
    system: str | None = None,
    template_args: Mapping[str, object] | None = None,
    control_tokens: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Read a document once and keep it, for `ask_document`.

    Args:
        model: of `wavejax.load`.
        text: the document's.
        path: a folder, made new; an earlier document there is replaced.
        raw, system, template_args, control_tokens, progress: as of `LanguageModel.stream`.

    Returns:
        the number of tokens that are kept.

    Raises:
        InputError: the text is empty or too long for the model, there is no memory to read it, or
            the folder cannot be written.
    """
    if not text.strip():
        raise InputError("the document is empty: give a text")
    path = Path(path)
    refuse_other(path)  # before anything is read
    if raw is None:
        raw = model.tokenizer.chat_template is None
    kept = DocumentText(text, raw, system, template_args, control_tokens)
    ids = kept.prefix(model.tokenizer)
    check_lengths(model.config, [ids], 1, model.max_context)
    generator = model.generator(len(ids), 1)
    keep_text(path, kept, ids, generator, model.params, model.tokenizer, progress)
    return len(ids)


def keep_text(
    path: Path,
    kept: DocumentText,
    ids: list[int],
    generator: Generator,
    params: Params,
    tokenizer: Tokenizer,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Read a document's tokens and keep them; see `read_document`."""
    state = generator.start(params, [ids], 1, progress=progress)
    save_document(
        state,
        path,
        generator=generator,
        params=params,
        token_ids=ids,
        tokenizer=tokenizer,
        facts={"text": dataclasses.asdict(kept)},
    )


def pinned(attention: AttentionChoice, path: Path) -> AttentionChoice:
    """Return the attention that goes on with a document: of `AutoAttention` the one that kept it.

    Raises:
        InputError: there is no document at `path`.
    """
    if not isinstance(attention, AutoAttention):
        return attention
    kept = read_folder(path).facts["fingerprints"]["attention"]
    return attention.full if kept == DenseAttention.__name__ else attention.config


def ask_document(
    model: LanguageModel,
    path: str | os.PathLike[str],
    question: str | Sequence[str],
    max_new_tokens: int = 256,
    *,
    sampler: Sampler | Literal["model"] | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    samples: int = 1,
) -> TextStream:
    """Ask a kept document: an answer piece by piece, as of `LanguageModel.stream`.

    Only the question's tokens are read. What the model is given is the document, an empty line and
    the question, as one message; of a text that is continued, the question follows at once.

    Args:
        model: of `wavejax.load`, with the model and the settings that read the document.
        path: the folder that `read_document` made.
        question: a text, or a batch of texts.
        max_new_tokens, sampler, seed, stop, samples: as of `LanguageModel.stream`.

    Returns:
        an iterator of `TextPiece`; its `result()` is the `Generation`.

    Raises:
        InputError: there is no document, or another model's; a parameter is none that can be used;
            or there is no memory for the run.
    """
    new_tokens = whole_number("max_new_tokens", max_new_tokens, 1, MOST_INT32)
    samples = whole_number("samples", samples, 1, MOST_SAMPLES)
    seed = whole_number("seed", seed, -MOST_INT32 - 1, MOST_INT32)
    chosen = model.sampler(sampler)
    check_samples(samples, chosen)
    questions = [question] if isinstance(question, str) else list(question)
    asked = Asked(Path(path), model.tokenizer, questions)
    check_lengths(model.config, asked.ids, new_tokens, model.max_context)
    lengths, room = asked.lengths(new_tokens)
    planned = dataclasses.replace(model, attention=pinned(model.attention, Path(path)))
    more = {"batch": len(lengths) * samples, "shortest_prompt": asked.shortest_prompt}
    generator = planned.generator(max(lengths), room, sampler=chosen, **more)
    if model not in _weights:
        _weights[model] = weights_fingerprint(model.params)
    read = asked.reader(generator, _weights[model])
    stops = [stop] if isinstance(stop, str) else list(stop)
    run = TextRun(generator, model.tokenizer, asked.prompts, samples, stops, read)

    def pieces() -> Any:
        run.start(model.params, new_tokens, seed)
        yield from run.pieces(model.params, new_tokens)

    return TextStream(run, pieces())
