"""Print an answer while it is generated, then sample two more side by side.

Shows `LanguageModel.stream`, its pieces, `Sampler`, `samples` and stop strings.
Takes about 20 s on two CPU cores, with the default model (SmolLM2-135M).

    python examples/stream_tokens.py
"""

import argparse

import wavejax


def main() -> None:
    """Streams one greedy answer and two sampled ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or file; the installed SmolLM2 unless given")
    parser.add_argument("--prompt", default="Name three colours of the rainbow.")
    arguments = parser.parse_args()
    # Full attention: a short prompt has nothing to leave out.
    model = wavejax.load(arguments.model, attention="full")

    stream = model.stream(arguments.prompt, max_new_tokens=24)
    for piece in stream:
        print(piece.text, end="", flush=True)
    result = stream.result()
    print(f"\n({len(result.token_ids)} tokens; finished: {result.finish_reason})")

    # The pieces of a batch come by turns: each says which answer it belongs to.
    texts = ["", ""]
    sampler = wavejax.Sampler(temperature=0.8, top_p=0.95)
    options = {"sampler": sampler, "seed": 1, "samples": 2, "stop": ["\n"]}
    for piece in model.stream(arguments.prompt, max_new_tokens=24, **options):
        texts[piece.answer] += piece.text
        if piece.finish_reason:
            print(f"answer {piece.answer} ({piece.finish_reason}): {texts[piece.answer]}")


if __name__ == "__main__":
    main()
