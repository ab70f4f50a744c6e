"""`response_format`, `tool_choice`: which tokens may come next so that an answer has its form.

The grammar is llguidance's; the engine asks it before each token (`engine.batching.Constraint`).
"""

import functools
import json
import threading
from typing import Any

import llguidance
import numpy as np

from wavejax.server.errors import ApiError
from wavejax.server.schemas import Format
from wavejax.server.service import Service
from wavejax.server.toolset import Toolset

# White space that may be of any length lets a model write nothing else.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarConstraint:
    """What may come next in one answer; see `engine.batching.Constraint`.

    Args:
        matcher: where the answer is in its grammar.
        vocab: how many tokens the model has.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocab: int):
        self._matcher, self._vocab = matcher, vocab

    def allowed(self) -> np.ndarray:
        """Tokens that may come next: `[vocab]` bool; where the JSON is whole, the stop tokens."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(mask, bitorder="little", count=self._vocab).astype(bool)

    def accept(self, token: int) -> None:
        """Take in the token that came; raises RuntimeError where the grammar does not have it."""
        taken = self._matcher.consume_token(token)
        self._check()
        if not taken:
            raise RuntimeError("a token came that the grammar does not have")

    def copy(self) -> "GrammarConstraint":
        """Another of the same moment."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar failed: {self._matcher.get_error()}")


class Grammars:
    """Makes constraints for one model.

    Args:
        service: the model.
    """

    def __init__(self, service: Service):
        self._service = service
        self._lock = threading.Lock()

    def constraint(self, wanted: Format) -> GrammarConstraint:
        """Make the constraint of a format that is not plain text; not in the event loop.

        Raises:
            ApiError: its schema is none that can be followed.
        """
        matcher = llguidance.LLMatcher(self._locked_tokenizer(), _grammar(wanted))
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise _refusal(f"the schema cannot be followed: {reason}")
        return GrammarConstraint(matcher, self._service.vocab)

    def call(self, tools: Toolset) -> GrammarConstraint:
        """Make the constraint of an answer that is one call; not in the event loop.

        Raises:
            ApiError: a function's schema is none that can be followed.
        """
        backend = self._service.tokenizer.backend

        def mark(text: str) -> str:
            """Name a control token, and put other text in quotes."""
            return text if backend.token_to_id(text) is not None else json.dumps(text)

        hermes = tools.family == "hermes"
        named = "arguments" if hermes else "parameters"
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, named: {"type": "object", **schema}},
                "required": ["name", named],
                "additionalProperties": False,
            }
            for name, schema in tools.parameters.items()
        ]
        schema = json.dumps({"x-guidance": _COMPACT, "anyOf": calls})
        begin, end = mark("<tool_call>"), mark("</tool_call>")
        start = f'{begin} "\\n" call "\\n" {end}' if hermes else "call"
        grammar = f"start: {start}\ncall: %json {schema}\n"
        matcher = llguidance.LLMatcher(
            self._locked_tokenizer(), llguidance.LLMatcher.grammar_from_lark(grammar)
        )
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            message = f"the parameters of a function cannot be followed: {reason}"
            raise ApiError(400, message, param="tools")
        return GrammarConstraint(matcher, self._service.vocab)

    def _locked_tokenizer(self) -> llguidance.LLTokenizer:
        with self._lock:
            return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        service = self._service
        if not service.stop_tokens:
            raise _refusal("the model has no token that ends an answer: leave it out")
        return llguidance.LLTokenizer(
            service.tokenizer.backend.to_str(),
            n_vocab=service.vocab,
            eos_token=list(service.stop_tokens),
        )


def _grammar(wanted: Format) -> str:
    schema: Any = {"type": "object"}
    if wanted.type == "json_schema":
        # Chat nests it, responses do not.
        schema = (wanted.json_schema or wanted.model_extra or {}).get("schema")
        if not isinstance(schema, dict):
            raise _refusal("it has no `schema`: give a JSON schema")
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_COMPACT)
    except ValueError as error:
        raise _refusal(f"the schema is none: {' '.join(str(error).split())}") from error


def _refusal(reason: str) -> ApiError:
    return ApiError(400, f"`response_format`: {reason}", param="response_format")
