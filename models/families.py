"""The families of models that can be read: a row each, and no family's name anywhere else.

One decoder serves all of them. A row says how a family is named in files, how its layers vary, what
holds where a file is silent, and how its texts are cut. docs/adding-a-model.md says how to add one.
"""

import enum
from dataclasses import dataclass

from models.errors import InputError

_MOST_LAYERS = 2**16


class WindowRule(enum.Enum):
    """Which layers slide a window over their attention, by a family's config.json.

    Within the window sliding and full attention are the same, so that the window ends the context.
    """

    EVERY_LAYER = "all, wherever `sliding_window` is a number"
    NAMED_LAYERS = "those that `layer_types` names"
    UPPER_LAYERS = (
        "none unless `use_sliding_window`; then those that `layer_types` names, or, where it names "
        "none, those from `max_window_layers` on"
    )
    LAYERS_WITHOUT_ROPE = (
        "none unless `use_sliding_window`; then those that `layer_types` names, or, where it names "
        "none, those without RoPE"
    )


@dataclass(frozen=True)
class Family:
    """One family of models. The defaults are those of most families.

    Attributes:
      name: `ModelConfig.architecture`, and `model_type` in config.json.
      hf_class: the class that `architectures` in config.json names; read where `model_type` is
        absent.
      gguf_architecture: `general.architecture` in a GGUF file, and the first part of the names of
        its settings; None where such files name another family.
      window_rule: which layers slide a window.
      default_window: tokens of the window where config.json is silent.
      default_context: `max_position_embeddings` where config.json is silent.
      default_theta: RoPE's base where a file is silent.
      default_head_dim: size of a head where config.json is silent; None for hidden size / heads.
      ties_embeddings: whether logits reuse the embedding where config.json is silent.
      qkv_bias: query, key and value projections add a bias.
      qk_norm: each query and key head is normalised before RoPE.
      no_rope_interval: the last of every n layers has no RoPE, where a file is silent; None where
        all layers have it. config.json may say otherwise by `no_rope_layers` or
        `no_rope_layer_interval`, if these are among `own_settings`; GGUF files are silent.
      own_settings: settings of config.json that this family reads, or whose effect its rows above
        describe. Others are refused unless they are neutral (`hf_config`).
      gguf_interleaved: GGUF files order the rows of queries and keys so that RoPE turns
        neighbours, as llama.cpp's converter writes them for some families.
      tokenizer_class: names a tokenizer of vocab.json and merges.txt that this family brought.
      pre_tokenizer: how texts are cut (a key of `text.pre_tokenizers.PRE_TOKENIZERS`) where no
        file says so.
      pre_tokenizer_of_size: the same, of a GGUF file whose vocabulary has a certain size: pairs of
        tokens and name.
      includes: models by other names that are of this family, for messages.
    """

    name: str
    hf_class: str
    gguf_architecture: str | None
    window_rule: WindowRule
    default_context: int
    default_window: int | None = None
    default_theta: float = 10000.0
    default_head_dim: int | None = None
    ties_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    no_rope_interval: int | None = None
    own_settings: frozenset[str] = frozenset()
    gguf_interleaved: bool = False
    tokenizer_class: str | None = None
    pre_tokenizer: str | None = None
    pre_tokenizer_of_size: tuple[tuple[int, str], ...] = ()
    includes: tuple[str, ...] = ()

    def unnamed_pre_tokenizer(self, num_tokens: int) -> str | None:
        """Return the pre-tokenizer of a byte-level GGUF file that names none, as old files do."""
        return dict(self.pre_tokenizer_of_size).get(num_tokens, self.pre_tokenizer)


_ROWS = (
    Family(
        name="llama",
        hf_class="LlamaForCausalLM",
        gguf_architecture="llama",
        window_rule=WindowRule.NAMED_LAYERS,
        default_context=2048,
        gguf_interleaved=True,
        # Llama 3's vocabulary. Llama 2's files have tokenizers of another kind.
        pre_tokenizer_of_size=((128256, "llama-bpe"),),
        includes=("SmolLM2",),
    ),
    Family(
        name="mistral",
        hf_class="MistralForCausalLM",
        gguf_architecture=None,  # they say llama
        window_rule=WindowRule.EVERY_LAYER,
        default_window=4096,
        default_context=131072,
    ),
    Family(
        name="qwen2",
        hf_class="Qwen2ForCausalLM",
        gguf_architecture="qwen2",
        window_rule=WindowRule.UPPER_LAYERS,
        default_window=4096,
        default_context=32768,
        qkv_bias=True,
        # transformers has the bias whatever this says, and none in the output projection.
        own_settings=frozenset({"attention_bias"}),
        tokenizer_class="Qwen2Tokenizer",
        pre_tokenizer="qwen2",
    ),
    Family(
        name="qwen3",
        hf_class="Qwen3ForCausalLM",
        gguf_architecture="qwen3",
        window_rule=WindowRule.UPPER_LAYERS,
        default_window=4096,
        default_context=32768,
        default_head_dim=128,
        qk_norm=True,
        own_settings=frozenset({"use_qk_norm"}),
        tokenizer_class="Qwen2Tokenizer",
        pre_tokenizer="qwen2",
    ),
    Family(
        name="smollm3",
        hf_class="SmolLM3ForCausalLM",
        gguf_architecture="smollm3",
        window_rule=WindowRule.LAYERS_WITHOUT_ROPE,
        default_context=32768,
        default_theta=2e6,
        ties_embeddings=True,
        no_rope_interval=4,
        own_settings=frozenset({"no_rope_layers", "no_rope_layer_interval"}),
        gguf_interleaved=True,
        pre_tokenizer="smaug-bpe",
    ),
)
FAMILIES: dict[str, Family] = {row.name: row for row in _ROWS}
"""The rows by `Family.name`."""


def family_of_hf_class(name: str) -> Family | None:
    """Return the family of a class that `architectures` names, whatever its case.

    None if unknown.
    """
    wanted, rows = short_class_name(name), FAMILIES.values()
    return next((row for row in rows if short_class_name(row.hf_class) == wanted), None)


def family_of_gguf(architecture: object) -> Family | None:
    """Return the family of a GGUF file's `general.architecture`; None if unknown or not there."""
    if architecture is None:
        return None
    return next((row for row in FAMILIES.values() if row.gguf_architecture == architecture), None)


def layers_with_rope(num_layers: int, no_rope_interval: int | None) -> tuple[bool, ...] | None:
    """For each layer whether it has RoPE: all but the last of every n; None where all have it.

    Raises InputError for more layers than a model can have.
    """
    if no_rope_interval is None or no_rope_interval > num_layers:
        return None
    if num_layers > _MOST_LAYERS:
        raise InputError(f"the model's num_layers is {num_layers}; expected at most {_MOST_LAYERS}")
    return tuple((layer + 1) % no_rope_interval != 0 for layer in range(num_layers))


def short_class_name(name: str) -> str:
    """``LlamaForCausalLM`` as ``llama``."""
    return name.removesuffix("ForCausalLM").lower()


def unknown_architecture(name: str) -> str:
    """Return the message for a model of a family that has no row."""
    included = "; ".join(
        f"{other} is {row.name}" for row in FAMILIES.values() for other in row.includes
    )
    return (
        f"model architecture {name!r} is not supported; supported are: "
        + ", ".join(FAMILIES)
        + (f" ({included})" if included else "")
    )
