"""Answer several requests side by side: each joins when it comes, and leaves when it is done.

Shows `wavejax.batch_engine`, `Request`, handles, cancellation and the engine's numbers.
Takes about 40 s on two CPU cores, with the default model (SmolLM2-135M).

    python examples/answer_side_by_side.py
"""

import argparse
import functools

import wavejax
from wavejax.engine.batching import Event, Piece


def show(name: str, event: Event) -> None:
    """Print an answer's text as it comes, with whose it is."""
    if isinstance(event, Piece) and event.text:
        print(f"{name}: {event.text!r}")


def main() -> None:
    """Send three requests to two slots, and end a fourth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or file; the installed SmolLM2 unless given")
    arguments = parser.parse_args()
    # Full attention: short prompts have nothing to leave out.
    model = wavejax.load(arguments.model, attention="full")

    def request(text: str, new_tokens: int, **options: object) -> wavejax.Request:
        return wavejax.Request(model.encode(text)[0].ids, new_tokens, **options)

    sampled = wavejax.Sampler(temperature=0.8, top_p=0.95)
    engine = wavejax.batch_engine(model, slots=2, max_context=512, max_new_tokens=64)
    with engine:
        # Callbacks run in the engine's thread. A server hands events to its own loop there.
        colours = engine.submit(
            request("Name three colours of the rainbow.", 16), functools.partial(show, "colours")
        )
        story = engine.submit(request("Tell me a story.", 24, sampler=sampled, seed=1))
        unwanted = engine.submit(request("Count to a thousand.", 64))
        sky = engine.submit(request("Why is the sky blue?", 16, stop=["."]))
        # This one has no callback: its pieces wait to be read.
        print("story:", "".join(piece.text for piece in story))
        unwanted.cancel()
        answer = sky.result()
        print(f"sky: {answer.text!r} ({answer.finish_reason})")
        print(f"its first token came after {answer.usage.first_token_seconds:.1f} s")
        engine.drain()
        print(f"colours done: {colours.done}")
        print(f"answers by their end: {dict(engine.stats().finished)}")


if __name__ == "__main__":
    main()
