"""Text of answers: pieces join to what the tokens say, and end before stop strings."""

import dataclasses

from tests.support.batch_requests import Alone, make_engine, run
from tests.support.small_tokenizers import byte_level, save
from tests.support.tiny_generator import make_prompts
from wavejax import Sampler
from wavejax.engine.batching import Request

PROMPT = make_prompts((5,))[0]


def test_pieces_join_to_the_text_and_end_before_a_stop_string(tmp_path):
    tokenizer = save(tmp_path, byte_level())
    engine = make_engine(tokenizer=tokenizer)
    whole = Request(PROMPT, 20, Sampler(1.1), seed=2, stop_tokens=())
    tokens, _ = Alone()(whole)
    text = tokenizer.decode(tokens)
    assert len(text) == 20  # a character a token
    stop = text[6:8]
    end = text.index(stop)
    requests = [whole, dataclasses.replace(whole, stop=[stop, "no such text"])]
    requests.append(dataclasses.replace(whole, stop_tokens=(tokens[3],)))
    handles = [engine.submit(request) for request in requests]
    # The host finds the end, so the slot is taken a little longer: others see nothing of it.
    run(engine)
    found = [handle.result(0) for handle in handles]
    assert (found[0].text, found[0].finish_reason) == (text, "length")
    assert (found[1].text, found[1].finish_reason) == (text[:end], "stop_string")
    assert found[1].token_ids == tokens[: end + 2]
    first = tokens.index(tokens[3])
    assert (found[2].text, found[2].finish_reason) == (text[:first], "stop")
    assert found[2].token_ids == tokens[: first + 1]
    assert engine.stats().finished == {"length": 1, "stop_string": 1, "stop": 1}


def test_text_that_was_held_back_comes_at_the_end(tmp_path):
    tokenizer = save(tmp_path, byte_level())
    engine = make_engine(tokenizer=tokenizer)
    request = Request(PROMPT, 5, stop_tokens=())
    text = tokenizer.decode(Alone()(request)[0])
    # The last characters may begin a stop string, and none comes of it.
    handle = engine.submit(dataclasses.replace(request, stop=[text[3:] + "~~~"]))
    run(engine)
    pieces = list(handle)
    assert "".join(piece.text for piece in pieces) == text
    assert pieces[-1].text.endswith(text[-1])
    assert pieces[3].text == ""
    assert len(pieces) == 5
