"""Public names have real types: nobody has to read the code to know what a parameter takes."""

import inspect
import re

import pytest

import wavejax
from models import config, decoder, unstacked
from models.checkpoints import open as checkpoints
from models.text import tokenizer

PUBLIC = [getattr(wavejax, name) for name in wavejax.__all__] + [
    *(checkpoints.open_checkpoint, checkpoints.Checkpoint, config.ModelConfig, decoder.Decoder),
    *(decoder.apply_model, decoder.apply_layer, tokenizer.load_tokenizer, tokenizer.Tokenizer),
    unstacked.stack_layers,
    unstacked.unstack_layers,
]


def functions_of(value):
    """A function, or a class's own public methods and properties, by name."""
    if not inspect.isclass(value):
        yield value.__name__, value
        return
    for name, member in vars(value).items():
        member = member.fget if isinstance(member, property) else member
        member = getattr(member, "__func__", member)
        if inspect.isfunction(member) and (not name.startswith("_") or name == "__call__"):
            yield f"{value.__name__}.{name}", member


@pytest.mark.parametrize("value", PUBLIC, ids=lambda value: value.__name__)
def test_no_signature_says_any(value):
    found = {}
    for name, function in functions_of(value):
        hints = {k: str(v) for k, v in inspect.get_annotations(function).items()}
        # A model's parameters are a tree, any attention is meant, and DTypeLike of JAX has one.
        hints = {
            k: re.sub(r"dict\[str, typing\.Any\]|(Attention|type)\[typing\.Any\]", "", v)
            for k, v in hints.items()
        }
        found |= {f"{name}({k})": v for k, v in hints.items() if re.search(r"\bAny\b", v)}
    if inspect.isclass(value):
        fields = inspect.get_annotations(value)
        found |= {
            f"{value.__name__}.{k}": str(v) for k, v in fields.items() if str(v) == "typing.Any"
        }
    assert not found
