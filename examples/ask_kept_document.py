"""Read a document once, keep it on disk, and ask it twice.

Shows `wavejax.read_document` and `ask_document`: a question costs its own tokens only.
Takes about 25 s on two CPU cores, with the default model (SmolLM2-135M) and a text of 600 words.

    python examples/ask_kept_document.py
    python examples/ask_kept_document.py --document FILE --folder DIR --model DIR
"""

import argparse
import tempfile
import time
from pathlib import Path

import wavejax

SETTINGS = wavejax.WaveConfig(growth_tokens=128, min_retrieved_tokens=128)
QUESTIONS = ("In which year was the bridge over the river Elm opened?", "When is the market held?")
FACT = "The bridge over the river Elm was opened in 1907."
LINE = "The town lies in a wide valley, and its market is held on the first day of every week."


def main() -> None:
    """Keep a document, ask two questions, and print the times to their first tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or file; the installed SmolLM2 unless given")
    parser.add_argument("--document", type=Path, help="UTF-8 text; one made here unless given")
    parser.add_argument(
        "--folder", type=Path, help="where to keep it; a temporary one unless given"
    )
    arguments = parser.parse_args()

    lines = [*[LINE] * 20, FACT, *[LINE] * 15]
    text = arguments.document.read_text("utf-8") if arguments.document else " ".join(lines)
    model = wavejax.load(arguments.model, attention=SETTINGS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "kept"
        begun = time.perf_counter()
        tokens = wavejax.read_document(model, text, folder)
        print(f"read {tokens} tokens, and kept them, in {time.perf_counter() - begun:.1f} s")
        for question in QUESTIONS:
            stream = wavejax.ask_document(model, folder, question, max_new_tokens=24)
            answer = "".join(piece.text for piece in stream)
            result = stream.result()
            new = result.prompt_tokens - tokens
            seconds = result.first_token_seconds
            print(f"{question} {answer}\n({new} new tokens; first token after {seconds:.1f} s)")


if __name__ == "__main__":
    main()
