"""Builds a tokenizer from tokenizer.model, a file of the SentencePiece library."""

import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers.models import Unigram

from models.errors import InputError
from models.text.control_tokens import is_special, looks_like_marker
from models.text.sentencepiece_bpe import (
    merges_from_scores,
    sentencepiece_bpe,
    space_decoder,
    space_normalizers,
)
from models.text.sentencepiece_proto import model_class
from models.text.text_files import one_line

# Of pieces and of models, as the library's file format numbers them.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2


def read_sentencepiece(
    file: Path, config: dict[str, Any], way_out: str
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the tokenizer, and what tokenizer_config.json would say of it where it is silent.

    config: what tokenizer_config.json does say.
    way_out: what to do with a file that cannot be read.
    Raises InputError if the file is not a model of a kind that is known here.
    """
    proto = _parse(file, way_out)
    kind = proto.trainer_spec.model_type
    if kind not in (_UNIGRAM, _BPE) or not proto.pieces:
        raise InputError(f"{file} is neither byte-pair encoding nor a unigram model: {way_out}")
    try:
        backend = _unigram(proto) if kind == _UNIGRAM else _byte_pairs(proto)
        _finish(backend, proto, first_only=config.get("legacy") is False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise InputError(f"{file} cannot be used ({one_line(error)}): {way_out}") from error
    controls = {i: p.piece for i, p in enumerate(proto.pieces) if p.type == _CONTROL}
    bos, eos = (controls.get(i) for i in (proto.trainer_spec.bos_id, proto.trainer_spec.eos_id))
    return backend, {"bos_token": bos, "eos_token": eos, "add_bos_token": bos is not None}


def _parse(file: Path, way_out: str) -> Any:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    proto = model_class()()
    try:
        proto.ParseFromString(content)
    except Exception as error:  # the protobuf library's own
        raise InputError(f"{file} is not a SentencePiece model: {way_out}") from error
    return proto


def _byte_pairs(proto: Any) -> tokenizers.Tokenizer:
    tokens = [piece.piece for piece in proto.pieces]
    unmerged = {i for i, piece in enumerate(proto.pieces) if piece.type != _NORMAL}
    merges = merges_from_scores(tokens, [piece.score for piece in proto.pieces], unmerged)
    return sentencepiece_bpe(
        tokens,
        merges,
        unknown=proto.trainer_spec.unk_id,
        leading_space=False,  # see _finish
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _unigram(proto: Any) -> tokenizers.Tokenizer:
    model = Unigram(
        [(piece.piece, piece.score) for piece in proto.pieces],
        unk_id=proto.trainer_spec.unk_id,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
    return tokenizers.Tokenizer(model)


def _finish(backend: tokenizers.Tokenizer, proto: Any, *, first_only: bool) -> None:
    """Normalisation, decoding and the pieces that are matched whole.

    first_only: the leading space is put before a text's beginning only, not after each control
        token too.
    """
    spec = proto.normalizer_spec
    leading_space = spec.add_dummy_prefix
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" +"), " "))
    steps += space_normalizers(leading_space and not first_only)
    backend.normalizer = normalizers.Sequence(steps)
    cuts: list[Any] = []
    if leading_space and first_only:
        cuts.append(pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    if proto.trainer_spec.model_type == _UNIGRAM and proto.trainer_spec.byte_fallback:
        # Else a text that spells a byte's name, <0x41>, would become that byte.
        cuts.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), behavior="isolated"))
    backend.decoder = space_decoder(leading_space, proto.trainer_spec.byte_fallback)

    markers = [
        AddedToken(
            piece.piece,
            normalized=False,
            special=piece.type != _USER_DEFINED or is_special(piece.piece),
        )
        for piece in proto.pieces
        if piece.type in (_CONTROL, _UNKNOWN)
        or (piece.type == _USER_DEFINED and looks_like_marker(piece.piece))
    ]
    backend.add_tokens(markers)
    # Other pieces of the user's, such as runs of spaces, are cut out of the normalised text.
    added = {token.content for token in markers}
    whole = sorted(
        (p.piece for p in proto.pieces if p.type == _USER_DEFINED and p.piece not in added),
        key=len,
        reverse=True,
    )
    if whole:
        pattern = Regex("|".join(map(re.escape, whole)))
        cuts.append(pre_tokenizers.Split(pattern, behavior="isolated"))
        if proto.trainer_spec.model_type == _BPE:
            backend.model.ignore_merges = True  # no merges make them
    if cuts:
        backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
