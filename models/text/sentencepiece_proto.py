"""The layout of SentencePiece's model files, as far as it is needed here.

The classes that come with the sentencepiece package refuse to be imported beside a protobuf package
older than they are. The layout itself has not changed since it was published.
"""

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_Field = descriptor_pb2.FieldDescriptorProto
_STRING, _BYTES, _FLOAT = _Field.TYPE_STRING, _Field.TYPE_BYTES, _Field.TYPE_FLOAT
_BOOL, _INT32 = _Field.TYPE_BOOL, _Field.TYPE_INT32  # an enum is written as an int32 is
_PACKAGE = "wavejax.sentencepiece"
# Name, number, type, and the value where a file has none.
_MESSAGES: dict[str, list[tuple[str, int, Any, str | None]]] = {
    "Piece": [("piece", 1, _STRING, None), ("score", 2, _FLOAT, None), ("type", 3, _INT32, "1")],
    "TrainerSpec": [
        ("model_type", 3, _INT32, "1"),
        ("byte_fallback", 35, _BOOL, "false"),
        ("unk_id", 40, _INT32, "0"),
        ("bos_id", 41, _INT32, "1"),
        ("eos_id", 42, _INT32, "2"),
    ],
    "NormalizerSpec": [
        ("precompiled_charsmap", 2, _BYTES, None),
        ("add_dummy_prefix", 3, _BOOL, "true"),
        ("remove_extra_whitespaces", 4, _BOOL, "true"),
    ],
    "Model": [
        ("pieces", 1, "Piece", None),
        ("trainer_spec", 2, "TrainerSpec", None),
        ("normalizer_spec", 3, "NormalizerSpec", None),
    ],
}


@functools.cache
def model_class() -> Any:
    """Return the class of a whole file; its `ParseFromString` raises on what is none."""
    file = descriptor_pb2.FileDescriptorProto(
        name="wavejax/sentencepiece.proto", package=_PACKAGE, syntax="proto2"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind, default in fields:
            field = message.field.add(name=field_name, number=number, label=_Field.LABEL_OPTIONAL)
            if isinstance(kind, str):
                field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                field.type = kind
            if field_name == "pieces":
                field.label = _Field.LABEL_REPEATED
            if default is not None:
                field.default_value = default
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))
