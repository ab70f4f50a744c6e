"""The field `document`: a prompt that begins with what was read before."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.errors import InputError
from models.text.conversation import read_messages
from models.text.tokenizer import Tokenizer
from wavejax.documents.document import Document
from wavejax.documents.shelf import DocumentNotFound, Shelf
from wavejax.documents.text import DocumentText
from wavejax.engine.prompt_text import EncodedPrompt
from wavejax.server.errors import ApiError

# The last tokens of a document may be others where a question follows: texts merge there.
_BORDER = 16


def open_document(shelf: Shelf | None, name: str) -> Document:
    """Open the document that a request names; not in the event loop.

    Raises:
        ApiError: 404 where there is none, 409 where it is damaged, or another model's.
    """
    if shelf is None:
        message = "this server keeps no documents: start it with `--documents DIR`"
        raise ApiError(404, message, param="document", code="document_not_found")
    try:
        return shelf.open(name)
    except DocumentNotFound as error:
        raise ApiError(404, str(error), param="document", code="document_not_found") from None
    except InputError as error:
        raise ApiError(409, str(error), param="document", code="document_mismatch") from error


def encode_about(
    tokenizer: Tokenizer,
    document: Document,
    messages: Sequence[Mapping[str, Any]],
    template_args: Mapping[str, Any],
) -> EncodedPrompt:
    """Encode a conversation about a document; what `ask_document` reads, for one message.

    Raises:
        ApiError: the document is none of a chat, or the prompt does not begin with it.
        InputError: the model cannot answer these messages.
    """
    kept = _text_of(document)
    if kept is None or kept.raw:
        message = (
            "the document was kept as a text or tokens that a prompt continues: send the rest as "
            "the `prompt` of /v1/completions"
        )
        raise _refusal(message)
    if kept.control_tokens:
        for one in read_messages(messages):
            _refuse_control_tokens(tokenizer, one["content"] or "")
    if messages and messages[0].get("role") in ("system", "developer"):
        message = (
            "the document was kept with its own system message, or none: leave the system message "
            "out"
        )
        raise _refusal(message)
    prompt = kept.conversation(tokenizer, messages, template_args)
    return _begins_with(document, prompt)


def encode_after(
    tokenizer: Tokenizer, document: Document, prompt: str | Sequence[int]
) -> EncodedPrompt:
    """Encode what continues a document: a text, or token ids.

    Raises:
        ApiError: the document is a chat's, or the prompt does not begin with it.
        InputError: the prompt is empty.
    """
    if not isinstance(prompt, str):
        return EncodedPrompt([*document.token_ids.tolist(), *prompt], True)
    kept = _text_of(document)
    if kept is None:
        message = "the document was kept of tokens, not of a text: send `prompt` as token ids"
        raise _refusal(message)
    if not kept.raw:
        message = "the document was kept for a chat: send messages to /v1/chat/completions"
        raise _refusal(message)
    if kept.control_tokens:
        _refuse_control_tokens(tokenizer, prompt)
    return _begins_with(document, kept.prompt(tokenizer, prompt))


def _text_of(document: Document) -> DocumentText | None:
    """Return the text that a document was made of; None where it was made of tokens."""
    return DocumentText.of(document.folder) if document.facts.get("text") is not None else None


def _begins_with(document: Document, prompt: EncodedPrompt) -> EncodedPrompt:
    alike, kept = document.reused(prompt.ids), len(document.token_ids)
    if alike < kept - _BORDER:
        message = (
            f"the prompt begins with {alike} of the document's {kept} tokens: what the chat "
            "template writes before it differs; leave out tools and template variables, or keep "
            "the document with them"
        )
        raise _refusal(message)
    return prompt


def _refuse_control_tokens(tokenizer: Tokenizer, text: str) -> None:
    """Raise ApiError for a text that would be read as control, as the document's own may be."""
    if tokenizer.control_tokens.starts(text, answer=False):
        message = "the text spells control tokens, which this document would have count: change it"
        raise _refusal(message)


def _refusal(message: str) -> ApiError:
    return ApiError(400, message, param="document", code="document_not_usable")
