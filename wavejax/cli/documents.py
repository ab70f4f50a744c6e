"""`--save-document` and `--document`: a text is read once, and asked in later runs."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from models.errors import InputError
from models.parameters import Params
from models.text.tokenizer import Tokenizer
from wavejax.cli.compilation import compilation_notices
from wavejax.cli.progress import bytes_text, progress_bar
from wavejax.cli.prompts import parse_template_args, read_prompts
from wavejax.documents.files import read_folder, refuse_other
from wavejax.documents.text import Asked, DocumentText, keep_text
from wavejax.engine.generator import Generator


def check_flags(
    document: str | None, save_document: str | None, others: Mapping[str, object]
) -> None:
    """Raise InputError where flags contradict each other.

    Args:
        document, save_document: what the two flags say.
        others: by its flag, what else was given that one of the two has no use for.
    """
    if document is not None and save_document is not None:
        raise InputError(
            "give --document or --save-document, not both: a document is kept once, then asked"
        )
    for flag, value in others.items():
        if not value and value != "":
            continue
        if flag == "--messages":
            name = "--document" if document is not None else "--save-document"
            raise InputError(f"{flag} is no text: give --prompt or --prompt-file with {name}")
        if document is not None:
            raise InputError(
                f"{flag} was decided when the document was kept: leave it out, or keep the "
                "document again with it"
            )


class Keeping:
    """One run of `--save-document`: reads a text, keeps it and ends.

    Args:
        path: the folder to make.
        tokenizer: the model's.
        prompts, prompt_files: as on the command line; one of all.
        raw: whether questions continue the text; None: if the model knows no chat.
        system, template_args, control_tokens: as on the command line.

    Raises:
        InputError: there is no text, or more than one; or something else is at `path`.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        prompt_files: Sequence[str],
        *,
        raw: bool | None,
        system: str | None,
        template_args: Sequence[str],
        control_tokens: bool,
    ):
        self.path, self.tokenizer = Path(path), tokenizer
        refuse_other(self.path)
        texts = read_prompts(prompts, prompt_files)
        if len(texts) > 1:
            raise InputError(f"--save-document keeps one text, and {len(texts)} are given")
        if raw is None:
            raw = tokenizer.chat_template is None
        values = parse_template_args(template_args) or None
        self.text = DocumentText(texts[0], raw, system, values, control_tokens)
        self.ids = self.text.prefix(tokenizer)

    def run(self, generator: Generator, params: Params, shown: bool, as_json: bool) -> None:
        """Read the text and keep it; say so."""
        with (
            compilation_notices("reads the document"),
            progress_bar("reading the document, building the index", shown) as report,
        ):
            given = self.path, self.text, self.ids, generator, params, self.tokenizer
            keep_text(*given, report if shown else None)
        size = read_folder(self.path).nbytes
        if as_json:
            kept = {"document": str(self.path), "tokens": len(self.ids), "bytes": size}
            print(json.dumps(kept, ensure_ascii=False), flush=True)
        else:
            print(f"kept {len(self.ids)} tokens in {self.path}: {bytes_text(size)}")


def ask(
    path: str, tokenizer: Tokenizer, prompts: Sequence[str], prompt_files: Sequence[str]
) -> Asked:
    """Encode the questions of `--document`; raises InputError as `Asked` does, or there is none."""
    return Asked(Path(path), tokenizer, read_prompts(prompts, prompt_files))


def say_reused(asked: Asked) -> None:
    """Say on stderr how many of the prompts' tokens were not read."""
    tokens = sum(map(len, asked.ids))
    print(
        f"document: {sum(asked.reused)} of {tokens} tokens of the prompt were reused",
        file=sys.stderr,
    )
