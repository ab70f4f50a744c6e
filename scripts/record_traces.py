"""Records which rows decoding retrieves: the traces that `compare_replacement.py` simulates on.

    python scripts/record_traces.py --out build/traces --context 8192 --new-tokens 256 --samples 2

Full attention reads a long real text with a question and answers it, sampled, so that it does not
repeat itself; small models still do, in long contexts: with `--answer text` the text's own next
tokens are the answer. Each method then runs the answer's tokens through decode steps of its own,
from the same prefill, and its trace is written to a file, with its KL divergence from full
attention.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from models.checkpoints.open import find_default_model, open_checkpoint
from models.errors import InputError
from models.text.tokenizer import Tokenizer, load_tokenizer
from wavejax import DenseAttention, Generator, Sampler, WaveConfig
from wavejax.cli.flags import in_flags
from wavejax.engine.generator import NO_TOKEN
from wavejax.engine.prompts import bucket
from wavejax.evaluation.files import replacing
from wavejax.evaluation.haystack import MANUAL, Haystack, load_haystack, paragraphs
from wavejax.evaluation.replacement.trace import record, tracing
from wavejax.evaluation.setup import check_context, make_room_for
from wavejax.evaluation.shared_prefill import SharedPrefill

QUESTIONS = (
    "Write a detailed guide for beginners about what this text explains, with examples.",
    "What are the ten most important rules in this text? Explain each of them and why it matters.",
    "Retell this text as a long conversation between a teacher and a curious student.",
)
SAMPLER = Sampler(temperature=1.0, top_p=0.95)


def methods() -> dict[str, WaveConfig]:
    """Return the settings recorded; only the last has floors, most of so short a text's budget."""
    wave = WaveConfig(min_clusters=0, min_candidate_tokens=0, min_retrieved_tokens=0)
    return {
        "paper, 1.8 %": WaveConfig.paper(),
        "wave, 0.9 %": wave,
        "wave, 0.45 %": dataclasses.replace(wave, retrieval_fraction=0.0045),
        "wave, 1.8 %": dataclasses.replace(wave, retrieval_fraction=0.018),
        "wave, by default": WaveConfig(),
    }


def from_another_part(text: Sequence[str], sample: int) -> list[str]:
    """Return a text in pieces, begun at another fifth for each sample.

    Its first part comes last.
    """
    first = sample * len(text) // 5 % len(text)
    return [*text[first:], *text[:first]]


def make_prompt(tokenizer: Tokenizer, tokens: int, sample: int) -> list[int]:
    """Return a prompt of at most so many tokens.

    It is prose, another part for each sample, and a question.
    """
    prose = from_another_part(paragraphs(), sample)
    question = QUESTIONS[sample % len(QUESTIONS)]

    def encode(count: int) -> list[int]:
        content = "\n\n".join([*prose[:count], question])
        return tokenizer.encode_chat([{"role": "user", "content": content}])

    low, high = 0, len(prose)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(encode(middle)) <= tokens else (low, middle)
    return encode(low)


def cut_text(
    tokenizer: Tokenizer, haystack: Haystack, tokens: int, new_tokens: int, sample: int
) -> tuple[list[int], np.ndarray]:
    """So many tokens of prose as a prompt, another part for each sample, and those that follow."""
    words = from_another_part(haystack.words, sample)
    ids = tokenizer.encode(" ".join(words), add_special=True)
    if len(ids) < tokens + new_tokens:
        raise InputError(
            f"the haystack {haystack.name} has {len(ids)} tokens; {tokens + new_tokens} are wanted:"
            " name another text by --haystack"
        )
    return ids[:tokens], np.asarray(ids[tokens : tokens + new_tokens], np.int32)


def distinct(answer: np.ndarray, size: int = 4) -> float:
    """Return the share of an answer's runs of `size` tokens that are different ones.

    An answer with a share of 1 repeats nothing.
    """
    runs = [tuple(answer[i : i + size].tolist()) for i in range(len(answer) - size + 1)]
    return len(set(runs)) / max(len(runs), 1)


def agreement(full_logits: jax.Array, logits: jax.Array) -> tuple[float, float]:
    """Mean KL(full || method) in nats, and the share of steps with the same most probable token.

    Args:
        full_logits: `[steps, vocab]`, from which full attention would have drawn each token.
        logits: the same of the method.
    """
    full, other = jax.nn.log_softmax(full_logits), jax.nn.log_softmax(logits)
    kl = jnp.sum(jnp.exp(full) * (full - other), axis=-1)
    same = jnp.argmax(full, axis=-1) == jnp.argmax(other, axis=-1)
    return float(jnp.mean(kl)), float(jnp.mean(same))


def main() -> int:
    """Record every sample; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the traces")
    parser.add_argument("--model", type=Path, help="GGUF file or folder (default: SmolLM2)")
    parser.add_argument("--context", type=int, default=8192, help="tokens, prompt and answer")
    parser.add_argument("--new-tokens", type=int, default=256, help="of the answer")
    parser.add_argument("--samples", type=int, default=2, help="texts and answers")
    parser.add_argument(
        "--answer",
        choices=("drawn", "text"),
        default="drawn",
        help="drawn from the model, or what follows in the text",
    )
    parser.add_argument(
        "--haystack", default=MANUAL, help="whose text follows: manual, essays or a text file"
    )
    parser.add_argument("--dtype", default="float32", help="of weights and cache")
    arguments = parser.parse_args()
    try:
        path = arguments.model or find_default_model()
        checkpoint = open_checkpoint(path)
        check_context(checkpoint, arguments.context, arguments.new_tokens)
        tokenizer = load_tokenizer(path)
        haystack = load_haystack([arguments.haystack])
        prompt_tokens = arguments.context - arguments.new_tokens
        texts = [
            cut_text(tokenizer, haystack, prompt_tokens, arguments.new_tokens, sample)
            for sample in range(arguments.samples if arguments.answer == "text" else 0)
        ]
        make_room_for(arguments.out / "trace.npz")
        params = checkpoint.load_params(arguments.dtype)
    except InputError as error:
        print("error:", in_flags(str(error)), file=sys.stderr)
        return 2
    # Without a stop token: every answer has the same length.
    full = Generator(checkpoint.config, DenseAttention(), SAMPLER)
    for sample in range(arguments.samples):
        if texts:
            prompt, answer = texts[sample]
            state = full.start(params, [prompt], arguments.new_tokens, seed=sample)
        else:
            prompt = make_prompt(tokenizer, prompt_tokens, sample)
            state = full.start(params, [prompt], arguments.new_tokens, seed=sample)
            copy = jax.tree.map(jnp.copy, state)
            copy, drawn = full.decode_n(params, copy, arguments.new_tokens)
            del copy
            answer = np.asarray(drawn)[:, 0]
            answer = answer[answer != NO_TOKEN]
        copy = jax.tree.map(jnp.copy, state)
        copy, full_logits = full.force(params, copy, jnp.asarray(answer)[:, None])
        del copy
        shared = SharedPrefill(state, bucket(len(prompt)), arguments.new_tokens)
        for name, config in methods().items():
            generator = Generator(checkpoint.config, tracing(config))
            with tqdm(total=len(answer), desc=f"sample {sample}: {name}") as bar:
                trace, logits = record(
                    *(generator, params, shared.state(generator), answer),
                    lambda *_, bar=bar: bar.update(),
                )
            kl, match = agreement(full_logits[:, 0], jnp.asarray(logits))
            about: dict[str, Any] = {
                "model": path.name,
                "method": name,
                "sample": sample,
                "context": len(prompt),
                "answer_is": arguments.answer,
                "answer": tokenizer.decode(answer.tolist()),
                "distinct": distinct(answer),
                "head_dim": checkpoint.config.head_dim,
                "kl": kl,
                "match": match,
                "jax": jax.__version__,
                "device": jax.devices()[0].device_kind,
                "dtype": arguments.dtype,
            }
            file = arguments.out / f"{path.stem}-{len(prompt)}-{sample}-{_slug(name)}.npz"
            with replacing(file) as part:
                dataclasses.replace(trace, about=about).save(part)
            print(f"{file}: KL {kl:.4f}, distinct {about['distinct']:.2f}", flush=True)
    return 0


def _slug(name: str) -> str:
    return (
        "".join(c if c.isalnum() or c == "." else "-" for c in name).replace("--", "-").strip("-")
    )


if __name__ == "__main__":
    sys.exit(main())
