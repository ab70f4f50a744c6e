"""Text to token ids and back, from a Hugging Face folder, a GGUF file or a converted checkpoint."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from models.checkpoints.model_path import resolve_model
from models.errors import InputError
from models.text.added_tokens import token_text
from models.text.chat import apply_chat
from models.text.control_tokens import END_TOKENS, ControlTokens
from models.text.conversation import refuse_spelt, render_conversation
from models.text.gguf_tokenizer import read_gguf_tokenizer
from models.text.text_stream import TextStream
from models.text.tokenizer_folder import read_folder_tokenizer

_CONTEXT_TOKENS = 64  # of a prompt, the last ones, which its continuation is decoded after


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Encodes and decodes text the way that one model was trained with.

    Fields:
        backend: vocabulary, merges and pre-tokenizer
        add_bos: whether `encode(text, add_special=True)` starts with the beginning-of-text token
        bos_token, eos_token: their text, or None where the model has none
        stop_ids: a generation ends with the first of these
        chat_template: Jinja source, or None where the model knows no chat
    """

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    add_bos: bool
    bos_token: str | None
    eos_token: str | None
    stop_ids: frozenset[int]
    chat_template: str | None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-text token, if there is one."""
        return None if self.bos_token is None else self.backend.token_to_id(self.bos_token)

    @functools.cached_property
    def control_tokens(self) -> ControlTokens:
        """The marks of the model's format, which texts do not turn into unless asked."""
        return ControlTokens(self.backend)

    def encode(self, text: str, *, add_special: bool, control_tokens: bool = False) -> list[int]:
        """Token ids of `text`.

        add_special: start with the beginning-of-text token, if the model wants one.
        control_tokens: control tokens that are written out in the text count as such; else they are
            text like any other.
        """
        if control_tokens:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        else:
            ids = self.control_tokens.encode_text(text)
        return self._begun(ids) if add_special else ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        template_args: Mapping[str, object] | None = None,
        control_tokens: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the model's answer starts.

        messages: `{"role": "system" | "user" | "assistant", "content": text}`, oldest first; the
            content may be a list of `{"type": "text", "text": text}` too.
        template_args: more variables for the template, such as `{"enable_thinking": False}`.
        control_tokens: control tokens that the messages spell out count as such; else they are text
            like any other.
        tools: functions that the model may call, as OpenAI's API describes them.
        Raises InputError if the model has no chat template, or the template refuses the messages,
        the variables or the tools, or leaves out a message; or if tools or calls of them spell
        control tokens that are not to count.
        """
        if not control_tokens:
            refuse_spelt(messages, tools or (), self.control_tokens)
        rendered = self._render(messages, template_args, tools)
        if control_tokens:
            return self.encode_chat_text(rendered.plain)
        encode = self.control_tokens.encode_marked
        return self._begun(encode(rendered.text, rendered.stand_ins))

    def chat_text(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        template_args: Mapping[str, object] | None = None,
    ) -> str:
        """Return the conversation as text, special tokens written out; see `encode_chat`."""
        return self._render(messages, template_args).plain

    def encode_chat_text(self, text: str) -> list[int]:
        """Token ids of what `chat_text` gave, whatever was appended to it.

        Control tokens written out in it count as such, whoever wrote them.
        """
        return self.encode(text, add_special=True, control_tokens=True)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, without special tokens.

        Bytes that are not UTF-8 become U+FFFD.
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def stream(self, prompt_ids: Sequence[int] = ()) -> TextStream:
        """Decode one token after the other, for printing while they are generated.

        prompt_ids: what the tokens continue, where that is one text with them: some tokenizers drop
            a space that a text begins with. None for an answer in a chat, a text of its own.
        """
        return TextStream(self.decode, self._is_visible, prompt_ids[-_CONTEXT_TOKENS:])

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `load_tokenizer(folder)` reads."""
        folder = Path(folder)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            "add_bos_token": self.add_bos,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "stop_token_ids": sorted(self.stop_ids),
            "chat_template": self.chat_template,
        }
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def _begun(self, ids: list[int]) -> list[int]:
        """Return a prompt's ids as the model reads them.

        The one place that decides how a prompt begins and ends. It begins with the
        beginning-of-text token where the model wants one, but never with two: most chat templates
        write it themselves. It never ends with the end-of-text token, which the post-processors of
        some tokenizers add, since it is to be continued.
        """
        bos_id = self.bos_id
        wanted = self.add_bos and bos_id is not None and ids[:1] != [bos_id]
        return [bos_id, *ids] if wanted and bos_id is not None else ids

    def _render(
        self,
        messages: Sequence[Mapping[str, object]],
        args: Mapping[str, object] | None,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> Any:
        if self.chat_template is None:
            raise InputError(
                "the model has no chat template: pass the prompt as it is (`raw=True`)"
            )
        render = functools.partial(
            apply_chat,
            self.chat_template,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            template_args=args,
            tools=tools,
        )
        return render_conversation(render, messages, self.control_tokens, self.chat_template)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    def _is_visible(self, index: int) -> bool:
        """Whether decoded text has a part of this token; ids past the vocabulary have none."""
        return index not in self._special_ids and self.backend.id_to_token(index) is not None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a model.

    The model is a Hugging Face folder, a GGUF file, or a converted checkpoint.

    Raises InputError if there is none at `path`, or one that cannot be read.
    """
    path = resolve_model(path)
    if path.is_dir():
        backend, config = read_folder_tokenizer(path)
    elif path.is_file():
        backend, config = read_gguf_tokenizer(path)
    else:
        raise InputError(f"no such file or folder: {path}")

    def text_of(name: str) -> str | None:
        # Older files hold {"content": "<s>", "lstrip": ...} in place of "<s>".
        token = token_text(config.get(name))
        known = token is not None and backend.token_to_id(token) is not None
        return token if known else None

    bos_token, eos_token = text_of("bos_token"), text_of("eos_token")
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        # Nothing is said, so what tokenizer.json itself adds counts.
        added = backend.encode("").ids
        add_bos = bos_token is not None and added[:1] == [backend.token_to_id(bos_token)]
    without_stops = Tokenizer(
        backend=backend,
        add_bos=bool(add_bos),
        bos_token=bos_token,
        eos_token=eos_token,
        stop_ids=frozenset(config["stop_token_ids"]),
        chat_template=config.get("chat_template") or None,
    )
    return dataclasses.replace(without_stops, stop_ids=_stop_ids(without_stops))


def _stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of `tokenizer.stop_ids`, the end of a text, and the tokens that end a turn."""
    added = tokenizer.backend.get_added_tokens_decoder()
    named = {index for index, token in added.items() if token.content in END_TOKENS}
    eos = tokenizer.eos_token  # not an added token everywhere
    eos_id = None if eos is None else tokenizer.backend.token_to_id(eos)
    named |= set() if eos_id is None else {eos_id}
    return tokenizer.stop_ids | named | _turn_end(tokenizer)


def _turn_end(tokenizer: Tokenizer) -> set[int]:
    """Return the control token that the chat template writes after an answer, if it writes one."""
    if tokenizer.chat_template is None:
        return set()
    answer = "\U00100000"  # no template looks for it, nor writes it
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": answer}]
    try:
        text = apply_chat(
            tokenizer.chat_template,
            messages,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            add_generation_prompt=False,
        )
    except InputError:  # the template is for other conversations, or broken: said when it is used
        return set()
    _, found, after = text.rpartition(answer)
    end = tokenizer.control_tokens.leading(after) if found else None
    return set() if end is None else {end}
