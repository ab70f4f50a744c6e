"""What an evaluation's samples and answers come from, for `Records`: all that changes them."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from models.checkpoints.open import Checkpoint
from models.errors import InputError
from wavejax.evaluation.samples import GENERATOR, Material, Sample, Task
from wavejax.evaluation.setup import Subject
from wavejax.evaluation.words import word_list
from wavejax.store.shape import CacheShape

# The part of a folder's settings that says the model's `CacheShape`; older folders lack it.
CACHE_SHAPE = "cache shape"
DIGITS = 16  # of a sha256: enough to tell files apart, and to be read
# Of weights, which may be hundreds of GB, blocks are read here and there.
BLOCKS, BLOCK = 64, 4096
# Text that tokenizers of one vocabulary cut in different ways, if they do anywhere.
PROBE = "In 1969, 7 of\n\n  1234567 DON'T naïve\té世界! x=f(y)[0]  "


def settings_of(subject: Subject, material: Material, seed: int) -> dict[str, Any]:
    """Return what decides all samples and all answers: settings of `Records`."""
    tokenizer = material.tokenizer
    vocabulary = sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items())
    cut = tokenizer.encode(PROBE, add_special=True)
    return {
        "model": subject.name,
        "model_sha256": _model(subject.checkpoint),
        "dtype": subject.dtype,
        "tokenizer_sha256": _sha256(vocabulary, cut, subject.stop_tokens),
        "chat_template_sha256": _sha256(tokenizer.chat_template),
        "haystack": material.haystack.name,
        "haystack_sha256": material.haystack.sha256,
        "generator": GENERATOR,
        "seed": seed,
    }


def parts_of(
    tasks: Mapping[str, Task],
    firsts: Mapping[tuple[str, int], Sample],
    batches: Mapping[str, int],
    unroll: bool,
    shape: CacheShape,
) -> dict[str, Any]:
    """Return what decides some of the samples and answers: parts of `Records`.

    Args:
        tasks: by name.
        firsts: the first sample of each task and length: whatever changes samples and is not named
            otherwise changes these.
        batches: for each task how many samples are run side by side.
        unroll: see `Generator`.
        shape: of the model's KV cache: it decides what methods cost.
    """
    sizes = {"layers": shape.layers, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    found: dict[str, Any] = {CACHE_SHAPE: sizes}
    found |= {f"task {name}": repr(task) for name, task in tasks.items()}
    for (name, length), sample in firsts.items():
        found[f"first sample of {name} at {length} tokens"] = sample.sha256
    words = _words()
    if words is not None:
        found["words_sha256"] = words
    # An answer that is drawn is another one where a program rounds otherwise.
    drawn = {"unroll": unroll, "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    for name, task in tasks.items():
        if task.sampled:
            found[f"answers drawn of {name}"] = {"batch": batches[name], **drawn}
    return found


def _model(checkpoint: Checkpoint) -> str:
    """Of the config, and of blocks of the weights' files."""
    found = hashlib.sha256(json.dumps(checkpoint.config.to_json(), sort_keys=True).encode())
    for file in _weights(checkpoint.path):
        size = file.stat().st_size
        found.update(size.to_bytes(8, "little"))
        with file.open("rb") as opened:
            for i in range(BLOCKS):
                opened.seek(max(0, size - BLOCK) * i // (BLOCKS - 1))
                found.update(opened.read(BLOCK))
    return found.hexdigest()[:DIGITS]


def _weights(path: Path) -> Sequence[Path]:
    """Return the files of a model's weights, in one order."""
    if path.is_file():
        parts = re.fullmatch(r"(.*)-\d+-of-(\d+)\.gguf", path.name)
        if parts is None:
            return [path]
        same = re.compile(rf"{re.escape(parts[1])}-\d+-of-{parts[2]}\.gguf")
        return sorted(file for file in path.parent.iterdir() if same.fullmatch(file.name))
    files = sorted(path.glob("*.safetensors"))
    other = (".json", ".md", ".txt", ".jinja")  # of an Orbax folder
    return files or sorted(x for x in path.rglob("*") if x.is_file() and x.suffix not in other)


def _words() -> str | None:
    """Of the word lists, whose package may be another version; None where it is not installed."""
    try:
        return _sha256([word_list(kind) for kind in ("nouns", "adjectives", "verbs")])
    except InputError:
        return None


def _sha256(*things: Any) -> str:
    text = json.dumps(things, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
