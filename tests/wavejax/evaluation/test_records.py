"""An evaluation's folder: no end of a run costs a record, and nothing that differs is mixed."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import InputError
from wavejax.evaluation.records import Records, blocks, key_of

ROOT = Path(__file__).parents[3]


def record(index, task="vt", method="wave", **more):
    return {"task": task, "length": 4096, "index": index, "method": method, **more}


def written(folder, count):
    with Records(folder, {"seed": 1}, {}) as records:
        records.append(map(record, range(count)))
    return folder / "records.jsonl"


def test_a_line_that_was_cut_is_cut_off_and_nothing_is_written_anew(tmp_path, monkeypatch):
    file = written(tmp_path, 5)
    whole = file.read_bytes()
    with file.open("ab") as cut:
        cut.write(b'{"task": "vt", "le')
    inode = file.stat().st_ino
    # Whoever opens the file for writing anew empties it first.
    original = Path.open

    def guarded(self, mode="r", *arguments, **keywords):
        assert self != file or "w" not in mode
        return original(self, mode, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", guarded)
    monkeypatch.setattr(Path, "write_bytes", None)
    with Records(tmp_path, {"seed": 1}, {}) as records:
        assert records.records == [record(i) for i in range(5)]
    assert (file.read_bytes(), file.stat().st_ino) == (whole, inode)


def test_a_record_that_lacks_only_its_end_is_kept(tmp_path):
    file = written(tmp_path, 2)
    file.write_bytes(file.read_bytes()[:-1])
    with Records(tmp_path, {"seed": 1}, {}) as records:
        assert len(records.done) == 2
        records.append([record(2)])
    with Records(tmp_path, {"seed": 1}, {}) as records:
        assert records.records == [record(i) for i in range(3)]


LIMIT = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
"""


def limited(limit, code):
    """Runs code in a process of its own, whose files may not grow past so many bytes."""
    done = subprocess.run(
        [sys.executable, "-c", LIMIT.format(limit=limit) + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_costs_no_record_of_before(tmp_path):
    """Neither where the cut line is dealt with, nor where more is appended, all of it or nothing;
    and the run that was refused can go on."""
    file = written(tmp_path, 200)
    whole = file.read_bytes()
    with file.open("ab") as cut:
        cut.write(b'{"task"')
    said = limited(
        len(whole) + 100,
        f"""
from pathlib import Path
from models.errors import InputError
from wavejax.evaluation.records import Records
one = {record(0)!r}
with Records(Path({str(tmp_path)!r}), {{"seed": 1}}, {{}}) as records:
    print(len(records.records))
    try:
        records.append([one | {{"index": 200 + i}} for i in range(9)])
    except InputError as error:
        print(error)
    print(len(records.records), len(records.done))
    records.append([one | {{"index": 200}}])
""",
    )
    before, error, after = said.splitlines()
    assert before == "200"
    assert error == f"cannot write {file}: File too large; what was written before is kept"
    assert after == "200 200"
    with Records(tmp_path, {"seed": 1}, {}) as records:
        assert records.records == [record(i) for i in range(201)]


def test_an_interruption_while_appending_leaves_whole_lines(tmp_path, monkeypatch):
    file = written(tmp_path, 3)
    whole = file.read_bytes()
    with Records(tmp_path, {"seed": 1}, {}) as records:
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                records.append([record(3), record(4)])
        assert file.read_bytes() == whole
        assert len(records.done) == 3
        records.append([record(3)])
    assert [json.loads(line)["index"] for line in file.open()] == [0, 1, 2, 3]


def test_settings_stay_where_they_cannot_be_written(tmp_path, monkeypatch):
    written(tmp_path, 1)
    settings = (tmp_path / "settings.json").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"settings\.json: No space left on device; what was"):
        Records(tmp_path, {"seed": 1}, {})
    assert (tmp_path / "settings.json").read_bytes() == settings
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(".lock", "records.jsonl", "settings.json")
    ]


def test_a_damaged_line_is_named(tmp_path):
    file = written(tmp_path, 4)
    lines = file.read_bytes().split(b"\n")
    for damage in (b"\0" * 20, b'{"task": "vt"}', b"[1, 2]"):
        file.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:]]))
        with pytest.raises(InputError, match=r"line 3 of .*records\.jsonl is not a record: remove"):
            Records(tmp_path, {"seed": 1}, {})


def test_parts_are_compared_where_both_runs_have_them(tmp_path):
    first = {"task vt": "4 hops", "drawn": {"batch": 2, "jax": "1"}}
    with Records(tmp_path, {"seed": 1}, {}, first) as records:
        records.append([record(0)])
    # Another task joins, one is left out: nothing that is there changes.
    with Records(tmp_path, {"seed": 1}, {}, {"task fwe": "3 words"}):
        pass
    with pytest.raises(InputError, match="whose task vt is '4 hops', not '5 hops': give another"):
        Records(tmp_path, {"seed": 1}, {}, {"task vt": "5 hops"})
    with pytest.raises(InputError, match=r"whose drawn\.batch is 2, not 1"):
        Records(tmp_path, {"seed": 1}, {}, {"drawn": {"batch": 1, "jax": "1"}})
    with pytest.raises(InputError, match="whose task fwe is '3 words', not '2 words'"):
        Records(tmp_path, {"seed": 1}, {}, {"task fwe": "2 words"})
    with Records(tmp_path, {"seed": 1}, {}, first) as records:
        assert len(records.done) == 1


def test_settings_that_only_one_run_has_are_named(tmp_path):
    with Records(tmp_path, {"seed": 1}, {}):
        pass
    with pytest.raises(InputError, match="that says nothing of its generator, which is 2 here"):
        Records(tmp_path, {"seed": 1, "generator": 2}, {})
    with pytest.raises(InputError, match="whose seed is 1, and nothing here"):
        Records(tmp_path, {}, {})


def test_records_of_another_sample_are_refused(tmp_path):
    """Methods are compared sample by sample: all must have read the same one."""
    with Records(tmp_path, {"seed": 1}, {}) as records:
        records.append([record(0, sample="ab"), record(1)])
        records.check_sample("vt", 4096, 0, "ab")
        with pytest.raises(InputError, match=r"another sample 0 of vt at 4096 tokens \(ab, not cd"):
            records.check_sample("vt", 4096, 0, "cd")
    with Records(tmp_path, {"seed": 1}, {}) as records:
        with pytest.raises(InputError, match="another sample 0 of vt"):
            records.check_sample("vt", 4096, 0, "cd")
        # Of those that nothing is known of any is as good.
        records.check_sample("vt", 4096, 1, "cd")
        records.check_sample("vt", 8192, 0, "cd")
        records.check_sample("fwe", 4096, 0, "cd")
        assert {key_of(one) for one in records.records} == records.done


def test_batches_of_one_size_keep_a_samples_neighbours():
    found = {n: blocks(n, 4, even=False) for n in range(1, 13)}
    assert all(list(b) == list(found[12][i]) for b_s in found.values() for i, b in enumerate(b_s))
    assert [list(block) for block in found[9]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
