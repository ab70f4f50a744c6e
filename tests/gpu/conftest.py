"""What the tests share: a model whose heads the kernels take, and what processes compile."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gpu_cases import CASES
from tests.support.tiny_models import CONFIGS, make_tensors, write_folder
from tests.wavejax.cli.conftest import TEMPLATE, VOCAB, write_tokenizer


@pytest.fixture(scope="session", autouse=True)
def programs_compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lets the processes that tests start share what they compile, tests side by side too."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(shared / "compiled"))
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")  # which tests/conftest.py turns off
        yield


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, 7 query heads a kv head."""
    folder = tmp_path_factory.mktemp("random")
    config = CONFIGS["llama"] | {
        "vocab_size": VOCAB,
        "hidden_size": 448,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
    }
    write_folder(folder, config, make_tensors(config))
    write_tokenizer(folder, chat_template=TEMPLATE)
    return folder


@pytest.hookimpl(optionalhook=True)  # xdist's, which `-p no:xdist` leaves out
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps a case's tests in one process, by `--dist loadscope`.

    They share its inputs and references, which take longer to make than the kernels take to run.
    """
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByCase(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            cases = (str(case) for case in CASES)
            return next(
                (case for case in cases if nodeid.endswith((f"[{case}]", f"-{case}]"))), nodeid
            )

    return ByCase(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets ops fall back: some tests are of what kernels do not support."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default::pallas_kernels.FallbackWarning"))
