"""A new folder is complete or not there, and what others made stays as it is."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from models.checkpoints import new_folder
from models.checkpoints.new_folder import make_folder, remove_unfinished
from models.errors import InputError

# Makes a folder, and stops half-way until it is killed.
HALF_WAY = """
import sys, time
from pathlib import Path
from models.checkpoints.new_folder import make_folder
def fill(folder):
    (folder / "half").write_text("half")
    print(folder, flush=True)
    time.sleep(600)
make_folder(Path(sys.argv[1]), fill)
"""


def touch(folder: Path) -> None:
    (folder / "file").touch()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leave(folder: Path, number: int = 1) -> tuple[Path, Path]:
    """What a killed process leaves: the unfinished folder, and its file that nobody locks."""
    unfinished = folder.with_name(f".{folder.name}.unfinished-{number}-0123abcd")
    unfinished.mkdir()
    touch(unfinished)
    lock = unfinished.with_name(unfinished.name + ".lock")
    lock.touch()
    return unfinished, lock


def test_a_folder_appears_once_it_is_complete(tmp_path: Path) -> None:
    folder, seen = tmp_path / "a" / "b" / "new", []

    def fill(unfinished: Path) -> None:
        assert unfinished.parent == folder.parent
        assert not folder.exists()
        touch(unfinished)
        seen.append(unfinished)

    make_folder(folder, fill)
    assert names(folder.parent) == ["new"]
    assert names(folder) == ["file"]
    assert len(seen) == 1
    with pytest.raises(InputError, match="exists already; name a new folder"):
        make_folder(folder, fill)


@pytest.mark.parametrize("made", ["an empty folder", "a full folder", "a file", "a link"])
def test_what_appears_meanwhile_stays(made: str, tmp_path: Path) -> None:
    folder = tmp_path / "new"

    def fill(unfinished: Path) -> None:
        touch(unfinished)
        if made == "a file":
            folder.write_text("theirs")
        elif made == "a link":
            folder.symlink_to("nowhere")
        else:
            folder.mkdir()
            if made == "a full folder":
                (folder / "theirs").touch()

    with pytest.raises(InputError, match="new exists already"):
        make_folder(folder, fill)
    assert names(tmp_path) == ["new"]
    if made == "a file":
        assert folder.read_text() == "theirs"
    elif made == "a link":
        assert folder.readlink() == Path("nowhere")
    else:
        assert names(folder) == ["theirs"] * (made == "a full folder")


def test_what_appears_at_the_last_moment_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "new", Path.rename

    def put_and_rename(source: Path, target: Path) -> Path:
        (target / "theirs").touch()
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", put_and_rename)
    with pytest.raises(OSError):
        make_folder(folder, touch)
    assert names(tmp_path) == ["new"]
    assert names(folder) == ["theirs"]


def test_nothing_is_left_of_what_failed(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "new"

    def fail(unfinished: Path) -> None:
        touch(unfinished)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_folder(folder, fail)
    assert names(tmp_path) == []

    def fail_beside_another(unfinished: Path) -> None:
        (folder.parent.parent / "theirs").touch()
        fail(unfinished)

    with pytest.raises(ZeroDivisionError):
        make_folder(folder, fail_beside_another)
    assert names(tmp_path / "a") == ["theirs"]


def test_a_parent_that_another_process_made_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, stat_of = tmp_path / "parent", new_folder.stat_of

    def look_and_be_late(path: Path, **options: bool) -> os.stat_result | None:
        found = stat_of(path, **options)
        if path == parent and found is None:
            parent.mkdir()
        return found

    monkeypatch.setattr(new_folder, "stat_of", look_and_be_late)
    with pytest.raises(ZeroDivisionError):
        make_folder(parent / "new", lambda _: touch(tmp_path) or 1 / 0)
    assert names(tmp_path) == ["file", "parent"]
    assert names(parent) == []


def test_what_a_killed_process_left_is_removed_and_no_living_ones(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    command = [sys.executable, "-c", HALF_WAY, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            unfinished = Path(process.stdout.readline().strip())
            assert str(process.pid) in unfinished.name
            before = names(tmp_path)
            remove_unfinished(folder)
            assert names(tmp_path) == before
            make_folder(folder, touch)
        finally:
            process.kill()
    assert names(tmp_path) == [*before, "new"]
    remove_unfinished(tmp_path / "other")
    assert names(unfinished) == ["half"]
    remove_unfinished(folder)
    assert names(tmp_path) == ["new"]


def test_a_living_process_may_be_this_one(tmp_path: Path) -> None:
    def fill(unfinished: Path) -> None:
        remove_unfinished(tmp_path / "new")
        touch(unfinished)

    make_folder(tmp_path / "new", fill)
    assert names(tmp_path) == ["new"]


def test_what_was_not_made_here_stays(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    (tmp_path / ".new.unfinished-1-0123abcd").mkdir()  # with no file beside it
    (tmp_path / ".new.unfinished-2").mkdir()
    (tmp_path / ".new.unfinished-2.lock").touch()
    (tmp_path / "kept").mkdir()
    touch(tmp_path / "kept")
    (tmp_path / ".new.unfinished-3-0123abcd").mkdir()
    (tmp_path / ".new.unfinished-3-0123abcd.lock").symlink_to("kept/file")
    (tmp_path / ".new.unfinished-4-0123abcd.lock").mkdir()
    (tmp_path / ".new.unfinished-5-0123abcd").symlink_to("kept")
    (tmp_path / ".new.unfinished-5-0123abcd.lock").touch()
    leave(tmp_path / "newer")
    leave(tmp_path / "new.unfinished-6")
    before = names(tmp_path)
    remove_unfinished(folder)
    assert names(tmp_path) == before
    assert names(tmp_path / "kept") == ["file"]


def test_whenever_it_was_killed(tmp_path: Path) -> None:
    unfinished, lock = leave(tmp_path / "new")
    leave(tmp_path / "new", 2)[0].joinpath("deep", "er").mkdir(parents=True)
    leave(tmp_path / "new", 3)
    remove_unfinished(tmp_path / "new")
    assert names(tmp_path) == []
    lock.touch()  # before it made the folder, or after it removed it
    remove_unfinished(tmp_path / "new")
    assert names(tmp_path) == []
    remove_unfinished(tmp_path / "absent" / "new")
    assert not unfinished.exists()


def test_what_cannot_be_removed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave(tmp_path / "new")
    with monkeypatch.context() as patched:
        patched.setattr(new_folder.shutil, "rmtree", lambda *_, **__: None)
        remove_unfinished(tmp_path / "new")
    assert names(tmp_path) == [path.name for path in left]
    remove_unfinished(tmp_path / "new")
    assert names(tmp_path) == []


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(new_folder.fcntl, "flock", flock)
    left = leave(tmp_path / "new")
    remove_unfinished(tmp_path / "new")
    make_folder(tmp_path / "new", touch)
    assert names(tmp_path) == [*(path.name for path in left), "new"]


def test_a_file_taken_for_a_dead_ones_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = new_folder._lock, []

    def remove_first(descriptor: int) -> bool | None:
        if not calls:
            remove_unfinished_without_lock()
        calls.append(descriptor)
        return lock(descriptor)

    def remove_unfinished_without_lock() -> None:
        for path in tmp_path.iterdir():
            path.unlink()

    monkeypatch.setattr(new_folder, "_lock", remove_first)
    make_folder(tmp_path / "new", touch)
    assert len(calls) == 2
    assert names(tmp_path) == ["new"]


def test_threads_make_folders_too(tmp_path: Path) -> None:
    def run(make: Callable[[], None]) -> None:
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()

    run(lambda: make_folder(tmp_path / "new", touch))
    assert names(tmp_path / "new") == ["file"]
