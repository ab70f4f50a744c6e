"""Files of results: whole or as before, whatever happens while they are written."""

import errno
import os

import numpy as np
import pytest

from models.errors import InputError
from wavejax.evaluation import plots
from wavejax.evaluation.files import append_lines, replacing, write_text
from wavejax.evaluation.setup import make_room_for


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def begun(file, error):
    """Writes a part of a file's new content, and fails if there is an error to fail with."""
    with replacing(file) as part:
        part.write_text("ne")
        assert part.suffix == file.suffix
        if error is not None:
            raise error


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_is_not_finished_replaces_nothing(tmp_path, there, error):
    file = tmp_path / "found.json"
    if there:
        file.write_text("old")
    with pytest.raises(error):
        begun(file, error())
    assert names(tmp_path) == (["found.json"] if there else [])
    assert not there or file.read_text() == "old"
    write_text(file, "néw")
    assert file.read_bytes() == "néw".encode()
    assert names(tmp_path) == ["found.json"]


@pytest.mark.parametrize("moment", ["while it is written", "when it should be on the disk"])
def test_a_full_disk_is_one_line_and_costs_nothing(tmp_path, monkeypatch, moment):
    file = tmp_path / "found.json"
    file.write_text("old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(_):
        raise full

    if moment != "while it is written":
        monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError) as said:
        begun(file, full if moment == "while it is written" else None)
    assert str(said.value) == (
        f"cannot write {file}: No space left on device; what was written before is kept"
    )
    assert (names(tmp_path), file.read_text()) == (["found.json"], "old")


def test_errors_without_a_reason_of_the_system_are_said_in_their_own_words(tmp_path):
    with pytest.raises(InputError, match="encoder error -2; what"):
        begun(tmp_path / "x.png", OSError("encoder error -2"))  # as Pillow's


def test_links_stay_links_and_pipes_are_written_to(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "file.json")
    write_text(link, "one")
    assert link.is_symlink()
    assert (tmp_path / "real" / "file.json").read_text() == "one"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "two")
    assert os.read(reader, 10) == b"two"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_plot_that_cannot_be_drawn_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "kl.png"
    plots.plot_by_position({"wave": np.array([0.1, 0.2])}, 128, "KL", file)
    drawn = file.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert names(tmp_path) == ["kl.png"]

    def fail(self, path, **_):
        path.write_bytes(drawn[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(InputError, match="cannot write"):
        plots.plot_by_position({"wave": np.array([0.1, 0.2])}, 128, "KL", file)
    assert (names(tmp_path), file.read_bytes()) == (["kl.png"], drawn)


def test_lines_are_appended_all_or_none(tmp_path, monkeypatch):
    file = tmp_path / "rates.jsonl"
    append_lines(file, ["1", "2"])

    def refuse(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(InputError, match=r"rates\.jsonl: Input/output error"):
            append_lines(file, ["3", "4"])
    append_lines(file, ["5"])
    assert file.read_text() == "1\n2\n5\n"


def test_room_is_looked_for_where_files_are_replaced(tmp_path, monkeypatch):
    """A file that may be written to, in a folder that may not, cannot be replaced: said at once."""
    file = tmp_path / "found.json"
    file.touch()
    make_room_for(file)
    monkeypatch.setattr(os, "access", lambda path, mode: path == file)
    with pytest.raises(InputError, match=r"cannot write .*found"):
        make_room_for(file)
