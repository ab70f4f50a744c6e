"""What can go wrong with a kept document: one clear error, and nothing that was whole is lost."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

import wavejax
from models.unstacked import unstack_layers
from tests.support.tiny_generator import CONFIG, GREEDY, MODEL, make_params, make_prompts
from wavejax import DenseAttention, Generator, InputError, WaveAttention, WaveConfig
from wavejax.documents import files
from wavejax.documents.files import LOCK, MANIFEST, read_folder, write_folder
from wavejax.documents.fingerprints import check_fingerprints, fingerprints, weights_fingerprint

ROOT = Path(__file__).parents[3]
DENSE = Generator(MODEL, DenseAttention(), GREEDY)
(PROMPT,) = make_prompts((20,))
ARRAYS = {"a": np.arange(50_000, dtype=np.float32), "b/0": np.ones((2, 3), "int8")}


def write(path, **changed):
    given = {name: (lambda x=x: x) for name, x in (ARRAYS | changed).items()}
    write_folder(path, {"note": "x"}, list(given.items()))


def same(path, **changed):
    found = read_folder(path).arrays
    for name, array in (ARRAYS | changed).items():
        np.testing.assert_array_equal(found[name].read(), array)
    # Of an earlier document, or an unfinished one, nothing is left.
    named = {array.file.parent for array in found.values()}
    assert {p for p in path.iterdir() if p.is_dir()} == named
    return True


def test_arrays_come_back_mapped(tmp_path):
    half = np.arange(3000, dtype=np.float32).astype("bfloat16")
    write(tmp_path / "kept", half=half, empty=np.zeros((2, 0, 3), "uint16"), one=np.asarray(7))
    folder = read_folder(tmp_path / "kept")
    assert folder.facts == {"note": "x"}
    assert isinstance(folder.arrays["a"].read().base, np.memmap)
    assert folder.arrays["half"].read().dtype == "bfloat16"
    assert folder.nbytes == sum(p.stat().st_size for p in (tmp_path / "kept").rglob("*.npy"))
    assert same(tmp_path / "kept", half=half, empty=np.zeros((2, 0, 3)), one=np.int32(7))
    # Any program that knows NumPy's format reads them.
    np.testing.assert_array_equal(np.load(folder.arrays["a"].file), ARRAYS["a"])


@pytest.mark.parametrize("at", [0, 60, 127, 128, 100_000, -1])
def test_any_flipped_byte_is_found(at, tmp_path):
    write(tmp_path)
    stored = read_folder(tmp_path).arrays["a"]
    data = bytearray(stored.file.read_bytes())
    data[at] ^= 4
    stored.file.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.npy .*the kept document is damaged; read the doc"):
        stored.read()


def test_files_that_are_cut_missing_or_swapped(tmp_path):
    write(tmp_path)
    stored = read_folder(tmp_path).arrays["a"]
    whole = stored.file.read_bytes()
    stored.file.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="has 200127 bytes, expected 200128"):
        stored.map()
    stored.file.unlink()
    with pytest.raises(InputError, match="is missing, expected 200128"):
        stored.map()
    np.save(stored.file, ARRAYS["a"].reshape(2, -1))
    with pytest.raises(InputError, match=r"has the shape \[2, 25000\]"):
        stored.map()


def test_a_damaged_manifest(tmp_path):
    write(tmp_path)
    file = tmp_path / MANIFEST
    text = file.read_text()
    for other in (text[:-30], text.replace('"x"', '"y"'), "[]", "", text.replace("50000", "50001")):
        file.write_text(other)
        with pytest.raises(InputError, match=r"document\.json is not what was written"):
            read_folder(tmp_path)
    said = json.loads(text) | {"version": 2}
    file.write_text(json.dumps(said))
    with pytest.raises(InputError, match="is of version 2, this program reads version 1"):
        read_folder(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match=r"is no kept document: it has no document\.json"):
        read_folder(tmp_path)
    write(tmp_path / "again")
    assert same(tmp_path / "again")


def test_a_new_document_takes_the_old_ones_place(tmp_path):
    path = tmp_path / "above" / "kept"
    write(path)
    write(path, a=ARRAYS["a"] + 1)
    assert same(path, a=ARRAYS["a"] + 1)
    assert {p.name for p in path.iterdir() if p.is_file()} <= {MANIFEST, LOCK}
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="is there already and no kept document"):
        write(other)
    assert [p.name for p in other.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("writes", [0, 1, 4])
def test_a_full_disk_leaves_what_was_there(before, writes, tmp_path, monkeypatch):
    """Whichever write it is that finds the disk full, the manifest's included."""
    path = tmp_path / "kept"
    if before:
        write(path)
    sync, left = os.fsync, [writes]

    def full(descriptor):
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    expected = r"kept cannot be written: No space left on device; free some space"
    if writes < 4:
        with pytest.raises(InputError, match=expected):
            write(path, a=ARRAYS["a"] + 1)
        assert same(path) if before else not path.exists()
    else:  # it was the last one, of the folder's names, which is of no consequence
        write(path, a=ARRAYS["a"] + 1)
        assert same(path, a=ARRAYS["a"] + 1)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import numpy as np
    from wavejax.documents import files

    path, at = Path(sys.argv[1]), sys.argv[2]
    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    if at == "arrays":
        made = [("a", lambda: np.zeros(50_000, np.float32)), ("b", kill)]
    else:
        made = [("a", lambda: np.zeros(50_000, np.float32))]
        setattr(files, at, kill)
    files.write_folder(path, {}, made)
"""


@pytest.mark.parametrize("at", ["arrays", "_write_manifest"])
def test_a_killed_save_leaves_the_old_one_whole(at, tmp_path):
    path = tmp_path / "kept"
    write(path)
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(path), at]
    done = subprocess.run(script, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len([p for p in path.iterdir() if p.is_dir()]) == 2
    np.testing.assert_array_equal(read_folder(path).arrays["a"].read(), ARRAYS["a"])
    # The next save removes what it left, and is not held up by its lock.
    write(path, a=ARRAYS["a"] + 2)
    assert same(path, a=ARRAYS["a"] + 2)


def test_another_model_or_other_settings_are_named(tmp_path):
    params, config = make_params(), WaveAttention(CONFIG)
    kept = fingerprints(MODEL, params, config)

    def refused(match, model=MODEL, attention=config, params=params, **changed):
        now = fingerprints(model, params, attention) | changed
        with pytest.raises(InputError, match=match):
            check_fingerprints("d", kept | {"tokenizer": "t", "template": "c"}, now)

    model = dataclasses.replace(MODEL, rope_theta=5e4)
    refused("another model: rope_theta is 10000.0 there and 50000.0 here; load it with", model)
    other = dataclasses.replace(CONFIG, cluster_size=4, sink_tokens=5)
    both = r"other settings: sink_tokens is 4 there and 5 here, cluster_size is 8 there and 4 here"
    refused(both, attention=WaveAttention(other))
    refused(r"another attention \(WaveAttention there, DenseA", attention=DenseAttention())
    half = jax.tree.map(lambda x: x.astype("float16"), params)
    refused(r"another dtype \(float32 there, float16 here\)", params=half)
    one = params["params"] | {"final_norm": params["params"]["final_norm"].at[3].add(1e-3)}
    refused("other weights of the model", params={"params": one})
    refused("another tokenizer", tokenizer="u", template="c")
    refused("another chat template", tokenizer="t", template="e")
    # What only steers how it is read is free; and so is where it lies.
    free = dataclasses.replace(CONFIG, retrieval_fraction=0.5, min_candidate_tokens=1)
    now = fingerprints(dataclasses.replace(MODEL, max_context=9), params, WaveAttention(free))
    check_fingerprints("d", kept, now)


def test_what_was_kept_before_a_setting_was_there_goes_on():
    """A document of an older version names no such settings: it has what was done then."""
    kept = fingerprints(MODEL, make_params(), WaveAttention(CONFIG), weights="w")
    for name in ("row_dtype", "reach", "pooled_covariance"):
        del kept["settings"][name]
    now = fingerprints(MODEL, make_params(), WaveAttention(CONFIG), weights="w")
    check_fingerprints("d", kept, now)
    other = dataclasses.replace(CONFIG, pooled_covariance=True)
    now = fingerprints(MODEL, make_params(), WaveAttention(other), weights="w")
    with pytest.raises(InputError, match="pooled_covariance is False there and True here"):
        check_fingerprints("d", kept, now)


def test_every_setting_is_compared_or_said_to_be_free():
    """A new field of `WaveConfig` counts as one that an index depends on, until it is listed."""
    kept = fingerprints(MODEL, make_params(), WaveAttention(CONFIG), weights="w")["settings"]
    free = {field.name for field in dataclasses.fields(WaveConfig)} - kept.keys()
    assert free == {
        "tolerance",
        "delta",
        "tolerance_draws",
        "tolerance_cap",
        "exact_fallback",
        "candidate_fraction",
        "min_candidate_tokens",
        "retrieval_fraction",
        "min_retrieved_tokens",
        "min_token_mass",
        "estimation_fraction",
        "cache_fraction",
        "admission_ratio",
        "audit",
    }


def test_the_weights_fingerprint_sees_every_weight():
    params = make_params()
    found = {weights_fingerprint(params)}
    copies = jax.tree.map(lambda x: x.copy(), params)
    assert weights_fingerprint(unstack_layers(copies)) in found
    query = params["params"]["layers"]["query"]
    for changed in (
        query.at[1, 3, 2].multiply(1.0001),
        query[::-1],
        query.at[0, :2].set(query[0, 1::-1]),
    ):
        layers = params["params"]["layers"] | {"query": changed}
        found.add(weights_fingerprint({"params": params["params"] | {"layers": layers}}))
    assert len(found) == 4


def test_a_document_with_a_flipped_byte_gives_no_token(tmp_path):
    given = {"generator": DENSE, "params": make_params()}
    state = DENSE.start(make_params(), [PROMPT], 4)
    wavejax.save_document(state, tmp_path / "d", token_ids=PROMPT, **given)
    document = wavejax.load_document(tmp_path / "d", **given)
    stored = document.folder.arrays["keys/1"]
    data = bytearray(stored.file.read_bytes())
    data[-7] ^= 64
    stored.file.write_bytes(data)
    with pytest.raises(InputError, match=r"keys\.1\.npy is not what was written"):
        document.start(DENSE, 4)
    tokens = document.folder.arrays["token_ids"].file
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match=r"token_ids\.npy is not what was written"):
        wavejax.load_document(tmp_path / "d", **given)
