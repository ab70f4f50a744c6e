"""The command of `wavejax.generate`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import click
from click.core import ParameterSource

from models.checkpoints.open import Checkpoint, find_default_model, open_checkpoint
from models.errors import InputError
from models.rope_option import with_rope_scaling
from models.text.stop_strings import StopStrings
from models.text.tokenizer import Tokenizer, load_tokenizer
from models.unstacked import unstack_layers
from wavejax.attention.dense import DenseAttention
from wavejax.cli.compilation import keep_compiled_programs
from wavejax.cli.encoding import check_lengths, encode_prompts
from wavejax.cli.generate_options import generate_options
from wavejax.cli.guard import main_guard
from wavejax.cli.interrupts import Terminated
from wavejax.cli.model_sampling import model_sampling, sampling_text
from wavejax.cli.options import GroupedCommand, fields_of
from wavejax.cli.planning import check_context, check_placement, plan_run, print_plan, unstacks
from wavejax.cli.progress import progress_bar
from wavejax.cli.run import Answer, Run
from wavejax.config import WaveConfig
from wavejax.engine.generator import Generator
from wavejax.engine.sampling import Sampler
from wavejax.planning.plan import FetchChoice, StoreChoice


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
    only_plan: bool,
    context: int | None,
    batch: int | None,
    dtype: str,
    store: StoreChoice,
    fetch: FetchChoice,
    attention: str,
    **settings: Any,
) -> None:
    """Generate text with full or with wave attention, and print it as it comes."""
    # All that can be wrong with the input is found before the weights are read.
    sampler, config = fields_of(Sampler, settings), fields_of(WaveConfig, settings)
    wave_or_full = config if attention == "wave" else DenseAttention()
    check_placement(attention, store, fetch)
    if "" in stops:
        raise InputError("--stop is empty, which every text holds: give the text to stop before")
    given = [*prompts, *prompt_files, *message_files]
    of_context = context is not None or batch is not None
    if of_context:
        check_context(only_plan, context, given)
    path = model if model is not None else find_default_model()
    checkpoint = _open(path, rope_scaling)
    stated = None
    if sampling == "model":
        stated = _not_given(model_sampling(checkpoint.path))
        sampler = dataclasses.replace(sampler, **stated)
    if samples > 1 and sampler.greedy:
        raise InputError(
            f"--samples {samples} without sampling would be {samples} times the same answer: give "
            "a --temperature above 0, or --sampling model"
        )
    ids: list[list[int]] = []
    raw = False
    if not of_context:
        tokenizer = load_tokenizer(checkpoint.path)
        ids, raw = encode_prompts(
            tokenizer,
            prompts,
            prompt_files,
            message_files,
            chat=chat,
            system=system,
            template_args=template_args,
            control_tokens=allow_control_tokens,
        )
        check_lengths(checkpoint, ids, max_new_tokens, max_context)
    lengths = [*map(len, ids)] or [context or 1] * (batch or 1)
    lengths = [length for length in lengths for _ in range(samples)]
    plan = plan_run(checkpoint, wave_or_full, lengths, max_new_tokens, dtype, store, fetch)
    if only_plan:
        print_plan(plan, checkpoint, as_json)
        return
    plan.check()
    if plan.shrunk is not None:
        print(f"note: store: {plan.need.rows_on}: {plan.reason}", file=sys.stderr)
    keep_compiled_programs()
    generator = Generator(
        checkpoint.config,
        plan.attention,
        sampler,
        tuple(sorted(tokenizer.stop_ids | set(checkpoint.config.stop_token_ids))),
    )

    shown = sys.stderr.isatty() if progress is None else progress
    answers = _answers(tokenizer, ids, samples, stops, raw=raw)
    run = Run(generator, answers, plan.dtype, quiet=as_json)
    try:
        with progress_bar("loading the model", shown) as report:
            params = checkpoint.load_params(plan.dtype, report)
        if unstacks(generator, plan):
            params = unstack_layers(params)
        run.generate(params, max_new_tokens, seed, shown)
    except (KeyboardInterrupt, Terminated) as error:
        run.interrupt(error.signal.name if isinstance(error, Terminated) else "SIGINT")
        raise
    finally:
        if as_json and (run.interrupted or run.facts):
            facts = {"model": str(checkpoint.path), "attention": attention, "seed": seed}
            facts["sampler"] = dataclasses.asdict(sampler)
            print(json.dumps(run.as_json(**facts), ensure_ascii=False), flush=True)
    print(run.facts_line(sampling_text(stated) if stated else None), file=sys.stderr)


def _open(path: Any, rope_scaling: str | None) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    if rope_scaling is None:
        return checkpoint
    return dataclasses.replace(
        checkpoint, config=with_rope_scaling(checkpoint.config, rope_scaling)
    )


def _not_given(values: dict[str, Any]) -> dict[str, Any]:
    """The values whose options are not on the command line, which counts for more."""
    source = click.get_current_context().get_parameter_source
    return {
        name: value
        for name, value in values.items()
        if source(name) in (ParameterSource.DEFAULT, None)
    }


def _answers(
    tokenizer: Tokenizer,
    ids: Sequence[list[int]],
    samples: int,
    stops: Sequence[str],
    *,
    raw: bool,
) -> list[Answer]:
    """One answer to come for each prompt and sample."""
    return [
        Answer(
            number,
            sample,
            prompt,
            # A text is continued; a message is answered, by a text that begins anew.
            tokenizer.stream(prompt if raw else ()),
            StopStrings(stops),
        )
        for number, prompt in enumerate(ids, 1)
        for sample in range(1, samples + 1)
    ]


main = main_guard(
    command,
    advice="use a shorter prompt, fewer prompts, --store host or, with rows there, a smaller "
    "--cache-fraction; --plan shows what a run takes",
)
