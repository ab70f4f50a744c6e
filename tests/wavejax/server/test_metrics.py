"""Metrics by the names that vLLM's dashboards have, and that they add up."""

from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.wavejax.server.conftest import HTTP, NAME, Running, wait_for


def read(server: Running) -> dict[str, float]:
    """Each number by its name, and by its reason or status if it has one."""
    got = HTTP.get(f"{server.url}/metrics")
    assert got.headers["content-type"].startswith("text/plain")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(got.text):
        for sample in family.samples:
            labels: dict[str, Any] = dict(sample.labels)
            assert labels.pop("model_name") == NAME
            if "le" not in labels:
                found[" ".join([sample.name, *labels.values()])] = sample.value
    return found


def test_they_add_up(server: Running, access_lines: list[str]) -> None:
    engine = server.service.engine
    wait_for(lambda: engine.stats().unfinished == 0)  # other tests' requests
    before = read(server)
    talk: Any = [{"role": "user", "content": "Hello"}]
    prompt = len(server.model.tokenizer.encode_chat(talk))
    asked: Any = {"model": NAME, "messages": talk, "max_tokens": 9}
    extra = {"ignore_eos": True}
    server.client.chat.completions.create(**asked, extra_body=extra)
    list(server.client.chat.completions.create(**asked, n=2, stream=True, extra_body=extra))
    token = server.client.chat.completions.create(
        **asked, logprobs=True, temperature=0, extra_body=extra
    )
    first = token.choices[0].logprobs
    assert first is not None
    with pytest.raises(openai.NotFoundError):
        server.client.chat.completions.create(model="other", messages=talk)
    wait_for(lambda: engine.stats().unfinished == 0 and len(access_lines) == 5)
    after = read(server)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["vllm:prompt_tokens_total"] == 4 * prompt
    assert grown["vllm:generation_tokens_total"] == 4 * 9
    assert grown["vllm:request_success_total length"] == 4
    assert grown["wavejax:requests_submitted_total"] == 4
    assert grown["wavejax:http_responses_total 404"] == 1
    assert grown["wavejax:http_responses_total 200"] == 4  # three answers, and the metrics
    for name in (
        *("time_to_first_token", "e2e_request_latency", "request_queue_time"),
        *("request_prefill_time", "request_decode_time", "request_time_per_output_token"),
    ):
        assert grown[f"vllm:{name}_seconds_count"] == 4, name
        assert grown[f"vllm:{name}_seconds_sum"] >= 0
    assert grown["vllm:inter_token_latency_seconds_count"] == 4 * 8
    assert grown["vllm:request_prompt_tokens_sum"] == 4 * prompt
    assert grown["vllm:request_generation_tokens_sum"] == 4 * 9
    assert grown["vllm:request_params_max_tokens_sum"] == 4 * 9
    first_token = grown["vllm:time_to_first_token_seconds_sum"]
    decode = grown["vllm:request_decode_time_seconds_sum"]
    total = grown["vllm:e2e_request_latency_seconds_sum"]
    assert abs(first_token + decode - total) < 1e-6
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["wavejax:slots"] == 2
    assert after["vllm:kv_cache_usage_perc"] == 0
