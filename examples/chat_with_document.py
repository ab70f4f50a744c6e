"""Ask a question about a document, by wave attention.

Shows `wavejax.load` and `LanguageModel.generate`: text in, text out, and what the attention read.
Takes about 20 s on two CPU cores, with the default model (SmolLM2-135M) and a text of 600 words.

    python examples/chat_with_document.py
    python examples/chat_with_document.py --document FILE --question "Who wrote it?" --model DIR
"""

import argparse
from pathlib import Path

import wavejax

# Of short texts all tokens would be attended to exactly: fewer of them are in this example.
SETTINGS = wavejax.WaveConfig(growth_tokens=128, min_retrieved_tokens=128)
QUESTION = "In which year was the bridge over the river Elm opened?"
FACT = "The bridge over the river Elm was opened in 1907."
LINE = "The town lies in a wide valley, and its market is held on the first day of every week."


def main() -> None:
    """Read a document, ask, and print the answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or file; the installed SmolLM2 unless given")
    parser.add_argument("--document", type=Path, help="UTF-8 text; one made here unless given")
    parser.add_argument("--question", default=QUESTION)
    arguments = parser.parse_args()

    lines = [*[LINE] * 20, FACT, *[LINE] * 15]
    document = arguments.document.read_text("utf-8") if arguments.document else " ".join(lines)
    model = wavejax.load(arguments.model, attention=SETTINGS)
    talk = [{"role": "user", "content": f"{document}\n\n{arguments.question}"}]
    result = model.generate(talk, max_new_tokens=32)

    print(result.text)
    assert result.facts is not None
    print(
        f"({result.prompt_tokens} tokens in the prompt, {result.facts.indexed_tokens} in the index "
        f"at the end; {result.facts.retrieved_share:.0%} retrieved in a step; finished: "
        f"{result.finish_reason})"
    )


if __name__ == "__main__":
    main()
