"""Every file is written whole or not at all, by one helper."""

import os

import pytest

from slimming import files
from slimming.report import figures


def test_what_is_written_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    files.write_text(path, "old")
    files.write_text(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_writer_leaves_the_old_file_alone(error, tmp_path):
    path = tmp_path / "a.json"
    files.write_text(path, "old")
    with pytest.raises(error), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_what_a_killed_writer_leaves_is_removed_and_nothing_else(tmp_path):
    for name in (".last.ckpt.tmp", ".result.json.tmp", "last.ckpt", "notes.tmp", ".hidden"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".folder.tmp").mkdir()
    files.remove_temporaries(tmp_path)
    assert set(os.listdir(tmp_path)) == {"last.ckpt", "notes.tmp", ".hidden", ".folder.tmp"}


def test_a_figure_is_a_png_under_its_temporary_name_too(tmp_path, monkeypatch):
    """The temporary name ends in .tmp, which is no picture's: the format must not be guessed from it."""
    seen = []
    original = files._synchronise
    monkeypatch.setattr(files, "_synchronise", lambda p: seen.append((p.name, p.read_bytes()[:4])) or original(p))
    figures.widths([4, "M", 6], [2, "M", 3], tmp_path / "widths.png")
    assert seen == [(".widths.png.tmp", b"\x89PNG")] and os.listdir(tmp_path) == ["widths.png"]
