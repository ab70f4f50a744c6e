"""A cache of documents: found by their tokens, removed by last use, safe for several processes."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny_generator import GREEDY, MODEL, make_params, make_prompts
from wavejax import DenseAttention, DocumentCache, Generator, InputError
from wavejax.documents.files import read_folder, write_folder
from wavejax.documents.leases import is_held, lease

ROOT = Path(__file__).parents[3]
DENSE = Generator(MODEL, DenseAttention(), GREEDY)
SIZE = 4128  # Bytes of a document of `write`.


def write(path):
    write_folder(path, {}, [("a", lambda: np.zeros(1000, np.float32))])


def names(cache):
    return [entry.path.name for entry in cache.entries()]


def leftovers(cache):
    return [p.name for p in cache.folder.iterdir() if p.name.startswith((".new", ".old"))]


def test_the_least_recently_used_goes_first(tmp_path):
    cache = DocumentCache(tmp_path / "new" / "cache", 3 * SIZE)
    for name in "abc":
        assert cache.add(name, write) == cache.folder / name
    assert names(cache) == ["c", "b", "a"]
    assert [entry.nbytes for entry in cache.entries()] == [SIZE] * 3
    # Used again, not written again.
    cache.add("a", lambda path: pytest.fail("it is there"))
    cache.add("d", write)
    assert names(cache) == ["d", "a", "c"]
    with lease(cache.folder / "c"):
        cache.add("e", write)
        assert names(cache) == ["e", "d", "c"]  # what is held stays, and the next one goes
    cache.evict(SIZE)
    assert names(cache) == ["e"]
    cache.evict(0)
    assert names(cache) == leftovers(cache) == []


def test_what_is_too_large_or_fails_is_not_kept(tmp_path):
    cache = DocumentCache(tmp_path, SIZE - 1)
    assert cache.add("a", write) is None
    with pytest.raises(InputError, match="full"):
        cache.add("a", lambda path: (write(path), (_ for _ in ()).throw(InputError("full"))))
    assert names(cache) == leftovers(cache) == []
    with pytest.raises(InputError, match="max_bytes is 0"):
        DocumentCache(tmp_path, 0)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made: Not a directory"):
        DocumentCache(tmp_path / "file" / "cache")


def test_a_prompt_finds_the_document_that_saves_most(tmp_path):
    params, cache = make_params(), DocumentCache(tmp_path)
    (long,) = make_prompts((90,))
    given = {"generator": DENSE, "params": params}
    for length in (40, 60):
        state = DENSE.start(params, [long[:length]], 4)
        path = cache.keep(state, token_ids=long[:length], **given)
        assert cache.keep(state, token_ids=long[:length], **given) == path
    assert len(names(cache)) == 2
    whole = DENSE.start(params, [long], 4)
    for prompt, reused in ((long, 60), (long[:50], 49), (long[:40], 40)):
        with cache.find(prompt, **given) as document:
            assert document.reused(prompt) == reused
            assert is_held(document.folder.path)
            state = document.start(DENSE, 4, params=params, prompts=[prompt])
        assert not is_held(document.folder.path)
        if prompt is long:
            np.testing.assert_allclose(state.logits, whole.logits, atol=1e-4)
    with cache.find([long[0] ^ 1, 3], **given) as document:
        assert document is None
    # Another model's documents are passed over, and so are damaged ones.
    with cache.find(long, weights="other", **given) as document:
        assert document is None
    with cache.find(long, **given) as document:
        best = document.folder
    best.arrays["token_ids"].file.write_bytes(b"")
    with cache.find(long, **given) as document:
        assert document.reused(long) == 40


PROCESS = """
    import sys
    import numpy as np
    from wavejax.documents.cache import DocumentCache
    from wavejax.documents.files import read_folder, write_folder
    from wavejax.documents.leases import lease

    cache, seed = DocumentCache(sys.argv[1], 6 * 4128), int(sys.argv[2])
    rng = np.random.default_rng(seed)
    for _ in range(40):
        name = f"d{rng.integers(12)}"
        value = float(name[1:])
        cache.add(name, lambda path: write_folder(
            path, {}, [("a", lambda: np.full(1000, value, np.float32))]))
        # Hold one, and read it: nobody removes it meanwhile.
        with cache._lock():
            held = cache.folder / name
            if not cache._touch(held):
                continue
            keeping = lease(held)
            keeping.__enter__()
        assert (read_folder(held).arrays["a"].read() == value).all()
        keeping.__exit__(None, None, None)
    print("done")
"""


@pytest.mark.slow(20)
def test_several_processes_share_a_cache(tmp_path):
    script = [sys.executable, "-c", textwrap.dedent(PROCESS), str(tmp_path)]
    running = [
        subprocess.Popen(
            [*script, str(seed)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out) == (0, "done\n"), err
    cache = DocumentCache(tmp_path, 6 * SIZE)
    cache.evict()
    assert 1 <= len(names(cache)) <= 6
    assert leftovers(cache) == []
    for entry in cache.entries():
        value = float(entry.path.name[1:])
        assert (read_folder(entry.path).arrays["a"].read() == value).all()


def test_what_a_killed_process_left_is_removed(tmp_path):
    """An unfinished document, and a lease: the system has let go of both."""
    cache = DocumentCache(tmp_path, 2 * SIZE)
    cache.add("a", write)
    script = f"""
        import os, signal
        from pathlib import Path
        from wavejax.documents.leases import lease
        folder = Path({str(tmp_path)!r})
        with lease(folder / "a"), lease(folder / ".new-1"):
            (folder / ".new-1").mkdir()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(command, cwd=ROOT, check=False)
    assert len([p for p in tmp_path.iterdir() if ".lease-" in p.name]) == 2
    cache.evict(0)
    assert names(cache) == leftovers(cache) == []
    assert not [p for p in tmp_path.iterdir() if ".lease-" in p.name]
