"""The command of `wavejax.generate`."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from models.errors import InputError
from wavejax.cli import documents
from wavejax.cli.compilation import keep_compiled_programs
from wavejax.cli.encoding import encode_prompts
from wavejax.cli.explaining import (
    check_platform,
    check_variable,
    explanation_json,
    print_explanation,
)
from wavejax.cli.flags import in_flags
from wavejax.cli.generate_options import generate_options
from wavejax.cli.guard import main_guard
from wavejax.cli.interrupts import Terminated
from wavejax.cli.model_sampling import sampling_text
from wavejax.cli.options import GroupedCommand, fields_of
from wavejax.cli.planning import check_context, print_plan, say_notes, weights_text
from wavejax.cli.progress import progress_bar
from wavejax.cli.run import Run
from wavejax.config import WaveConfig
from wavejax.documents.text import pinned
from wavejax.engine.generator import Generator
from wavejax.engine.model_sampling import check_samples, model_sampling
from wavejax.engine.prompt_text import EncodedPrompt, check_lengths
from wavejax.engine.sampling import Sampler
from wavejax.engine.text import TextRun
from wavejax.loading import check_placement, named_attention, open_model
from wavejax.planning.plan import FetchChoice, StoreChoice
from wavejax.planning.table import attention_name


@click.command(
    cls=GroupedCommand,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@generate_options
def command(
    model: str | None,
    prompts: tuple[str, ...],
    prompt_files: tuple[str, ...],
    message_files: tuple[str, ...],
    save_document: str | None,
    document: str | None,
    system: str | None,
    chat: bool | None,
    template_args: tuple[str, ...],
    allow_control_tokens: bool,
    max_context: int | None,
    rope_scaling: str | None,
    max_new_tokens: int,
    stops: tuple[str, ...],
    sampling: str,
    samples: int,
    seed: int,
    as_json: bool,
    progress: bool | None,
    explained: bool,
    only_plan: bool,
    context: int | None,
    batch: int | None,
    dtype: str,
    weight_dtype: str,
    store: StoreChoice,
    fetch: FetchChoice,
    attention: str | None,
    **settings: Any,
) -> None:
    """Generate text with full or with wave attention, and print it as it comes."""
    # All that can be wrong with the input is found before the weights are read.
    sampler, config = fields_of(Sampler, settings), fields_of(WaveConfig, settings)
    wave_or_full = named_attention(attention, config)
    if document is not None:
        wave_or_full = pinned(wave_or_full, Path(document))
    check_placement(wave_or_full, store, fetch)
    check_variable()
    if explained and only_plan:
        raise InputError("--explain is for a run, and --plan runs nothing: leave out one of them")
    if "" in stops:
        raise InputError("--stop is empty, which every text holds: give the text to stop before")
    given = [*prompts, *prompt_files, *message_files]
    if document is not None or save_document is not None:
        how: dict[str, object] = {"--system": system, "--chat or --raw": chat is not None}
        how |= {"--template-arg": template_args, "--allow-control-tokens": allow_control_tokens}
        others: dict[str, object] = {"--messages": message_files}
        others |= how if document is not None else {}
        documents.check_flags(document, save_document, others)
    of_context = context is not None or batch is not None
    if of_context:
        check_context(only_plan, context, given)
    opened = open_model(
        model,
        dtype=dtype,
        attention=wave_or_full,
        store=store,
        fetch=fetch,
        rope_scaling=rope_scaling,
        weight_dtype=weight_dtype,
    )
    checkpoint = opened.checkpoint
    stated = None
    if sampling == "model":
        stated = _not_given(model_sampling(checkpoint.path))
        sampler = dataclasses.replace(sampler, **stated)
    check_samples(samples, sampler)
    ids: list[list[int]] = []
    raw = False
    asked = keeping = None
    if document is not None and not of_context:
        asked = documents.ask(document, opened.tokenizer, prompts, prompt_files)
        ids, raw = asked.ids, asked.prompts[0].raw
    elif save_document is not None and not of_context:
        keeping = documents.Keeping(
            save_document,
            opened.tokenizer,
            prompts,
            prompt_files,
            raw=None if chat is None else not chat,
            system=system,
            template_args=template_args,
            control_tokens=allow_control_tokens,
        )
        ids, max_new_tokens, samples = [keeping.ids], 1, 1
    elif not of_context:
        ids, raw = encode_prompts(
            opened.tokenizer,
            prompts,
            prompt_files,
            message_files,
            chat=chat,
            system=system,
            template_args=template_args,
            control_tokens=allow_control_tokens,
        )
    check_lengths(checkpoint.config, ids, max_new_tokens, max_context)
    lengths, room = [*map(len, ids)] or [context or 1] * (batch or 1), max_new_tokens
    if asked is not None:
        lengths, room = asked.lengths(max_new_tokens)
    lengths = [length for length in lengths for _ in range(samples)]
    shortest = None if asked is None else asked.shortest_prompt
    plan = opened.plan(lengths, room, sampler, shortest_prompt=shortest)
    if only_plan:
        print_plan(plan, checkpoint, as_json)
        return
    plan.check()
    say_notes(checkpoint, opened.weight_dtype)
    check_platform()
    if plan.shrunk is not None:
        print(f"note: store: {plan.need.rows_on}: {plan.reason}", file=sys.stderr)
    keep_compiled_programs()
    generator = Generator(checkpoint.config, plan.attention, sampler, opened.stop_tokens)

    shown = sys.stderr.isatty() if progress is None else progress
    if keeping is not None:
        with progress_bar("loading the model", shown) as report:
            params = opened.load(plan=plan, progress=report).params
        keeping.run(generator, params, shown, as_json)
        return
    encoded = [EncodedPrompt(prompt, raw) for prompt in ids]
    read = None if asked is None else asked.reader(generator)
    text = TextRun(generator, opened.tokenizer, encoded, samples, stops, read)
    run = Run(text, plan.dtype, quiet=as_json)
    try:
        with progress_bar("loading the model", shown) as report:
            params = opened.load(plan=plan, progress=report).params
        run.generate(params, max_new_tokens, seed, shown)
    except (KeyboardInterrupt, Terminated) as error:
        run.interrupt(error.signal.name if isinstance(error, Terminated) else "SIGINT")
        raise
    finally:
        if as_json and (run.interrupted or run.result.facts):
            named = attention_name(plan.attention)
            facts = {"model": str(checkpoint.path), "attention": named, "seed": seed}
            facts |= {"weight_bits": plan.weight_bits} if plan.formats else {}
            facts |= {"notes": [*map(in_flags, plan.notes)]} if plan.notes else {}
            facts |= {"attention_reason": plan.chosen} if plan.chosen else {}
            facts["sampler"] = dataclasses.asdict(sampler)
            if asked is not None:
                facts |= {"document": document, "reused_tokens": asked.reused}
            if explained:
                facts["ops"] = explanation_json()
            print(json.dumps(run.as_json(**facts), ensure_ascii=False), flush=True)
    if asked is not None:
        documents.say_reused(asked)
    if explained and not as_json:
        print_explanation()
    chosen = plan.chosen and f"{attention_name(plan.attention)} attention ({plan.chosen})"
    of_model = sampling_text(stated) if stated else None
    print(run.facts_line(of_model, chosen, weights_text(plan)), file=sys.stderr)


def _not_given(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values whose options are not on the command line, which counts for more."""
    source = click.get_current_context().get_parameter_source
    return {
        name: value
        for name, value in values.items()
        if source(name) in (ParameterSource.DEFAULT, None)
    }


main = main_guard(
    command,
    advice="use a shorter prompt, fewer prompts, --store host or, with rows there, a smaller "
    "--cache-fraction; --plan shows what a run takes",
)
