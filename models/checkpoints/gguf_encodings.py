"""The encodings of GGUF tensors: which can be decoded, and what to do about the others."""

import functools

import gguf
import numpy as np

# Numbers that no longer stand for an encoding, or do so in forks of llama.cpp only, whose names
# people meet in the names of files. The gguf package knows neither.
_REMOVED = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
_FORKS = {
    133: "Q6_0",
    134: "IQ1_BN",
    135: "IQ2_BN",
    137: "IQ2_K",
    138: "IQ3_K",
    139: "IQ4_K",
    140: "IQ5_K",
    141: "IQ6_K",
    144: "IQ4_KS",
    145: "IQ2_KS",
    146: "IQ4_KSS",
    152: "IQ5_KS",
    153: "IQ2_KT",
    154: "IQ3_KT",
    155: "IQ4_KT",
    156: "IQ3_KS",
    157: "IQ2_KL",
    158: "IQ1_KT",
}
# From here on llama.cpp has no numbers; ik_llama.cpp does.
_FIRST_OF_FORKS = 96
_USUAL = ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0")


def is_decodable(encoding: gguf.GGMLQuantizationType) -> bool:
    """Whether tensors of this encoding can be read."""
    if encoding in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return True
    block_bytes = gguf.GGML_QUANT_SIZES[encoding][1]
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), encoding)
    except NotImplementedError:
        return False
    return True


def unknown_encoding(number: int) -> str:
    """Return what is said of a tensor whose encoding's number the gguf package does not know."""
    if number in _REMOVED:
        name = _REMOVED[number]
        plain = "IQ4_NL" if name.startswith("IQ4_NL") else "Q4_0"
        what = f"encoding {name} (number {number}), which llama.cpp has removed"
        if number in (4, 5):
            return f"{what}; {_take_another()}"
        return f"{what}: it was {plain} in another order; take the {plain} file of the model"
    if number in _FORKS:
        what = f"encoding {_FORKS[number]} (number {number}), which only a fork of llama.cpp has"
        return f"{what}; {_take_another()}"
    what = f"encoding number {number}, which the installed gguf package does not know"
    if number >= _FIRST_OF_FORKS:
        return f"{what}: a fork of llama.cpp wrote it; {_take_another()}"
    return f"{what}; update that package, or {_take_another()}"


def undecodable_encoding(encoding: gguf.GGMLQuantizationType) -> str:
    """Return what is said of a tensor whose encoding the gguf package knows and cannot decode."""
    return f"{encoding.name}, which the gguf package cannot decode; {_take_another()}"


@functools.cache
def _take_another() -> str:
    known = [name for name in _USUAL if is_decodable(gguf.GGMLQuantizationType[name])]
    return f"take another file of the model ({', '.join(known[:-1])} or {known[-1]})"
