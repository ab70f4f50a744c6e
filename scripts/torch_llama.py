"""Transformers' Llama with random weights and caches of random keys and values; needs torch."""

import contextlib
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer


class Reserved(DynamicLayer):
    """One layer's keys and values, with room for all that are to come."""

    def __init__(self, tokens: int):
        """Keep room for this many tokens of each sequence."""
        super().__init__()
        self.tokens, self.held = tokens, 0
        self.room: tuple[Any, ...] = ()

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Append `[batch, kv_heads, new, head_dim]`; return all there is, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            size = (*key_states.shape[:2], self.tokens, key_states.shape[3])
            self.room = tuple(key_states.new_empty(size) for _ in range(2))
        end = self.held + key_states.shape[2]
        for held, new in zip(self.room, (key_states, value_states), strict=True):
            held[:, :, self.held : end] = new
        self.held = end
        self.keys, self.values = (held[:, :, :end] for held in self.room)
        return self.keys, self.values


def random_llama(sizes: dict[str, Any], dtype: Any, device: str) -> Any:
    """Make the model, in evaluation mode.

    Args:
        sizes: a `ModelConfig` as JSON.
        dtype: of its weights.
        device: PyTorch's name of it.
    """
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        max_position_embeddings=sizes["max_context"],
        rms_norm_eps=sizes["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"]},
        tie_word_embeddings=sizes["tie_embeddings"],
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.eval()


def bytes_of_token(model: Any) -> int:
    """Bytes of a token's keys and values in all layers."""
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return int(numbers * model.dtype.itemsize)


def decode(model: Any, cache: Any, tokens: Any, steps: int, *, flash: bool = False) -> Any:
    """Decode, and return the logits of the last step, `[batch, vocab]`.

    Args:
        model: transformers' Llama.
        cache: of `fill_cache`; grows by `steps` tokens.
        tokens: `[batch, 1]`, fed at the first step; at each other, the one that follows.
        steps: one or more.
        flash: let PyTorch take none but its flash kernels for attention.
    """
    logits = None
    kernels = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else contextlib.nullcontext()
    with torch.inference_mode(), kernels:
        for step in range(steps):
            fed = (tokens + step) % model.config.vocab_size
            logits = model(input_ids=fed, past_key_values=cache, use_cache=True).logits[:, -1]
            # Drawn as generation does, and forgotten.
            logits.argmax(dim=-1)
    return logits


def fill_cache(kind: str, model: Any, context: int, batch: int, room: int) -> Any:
    """Make a cache of random keys and values.

    Args:
        kind: "dynamic", or "reserved"; see `torch_baseline`.
        model: whose cache.
        context: tokens of each sequence.
        batch: sequences.
        room: tokens that a sequence will have in the end.
    """
    config = model.config
    layers = range(config.num_hidden_layers)
    dynamic = kind == "dynamic"
    reserved = [Reserved(room) for _ in layers]
    cache = DynamicCache(config=config) if dynamic else Cache(layers=reserved)
    size = batch, config.num_key_value_heads, context, config.head_dim
    made = torch.Generator(model.device).manual_seed(1)
    for layer in layers:
        keys, values = (
            torch.randn(size, dtype=model.dtype, device=model.device, generator=made)
            for _ in range(2)
        )
        cache.update(keys, values, layer)
    return cache
