"""Files: whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeflex import files
from edgeflex.errors import DeviceError, InputError
from edgeflex.files import read_bytes, read_text, refuse_output, sha256_file, staged_folder, write_atomic


def below(folder: Path) -> dict[str, str]:
    """Return every file below ``folder`` with its text, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def full_disk(*_args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- write_atomic -------------------------------------------------------------------------------------


def test_a_file_is_written_with_its_folders(tmp_path: Path):
    write_atomic(tmp_path / "a" / "b.json", "text")
    write_atomic(tmp_path / "a" / "b.json", b"newer")
    assert below(tmp_path) == {"a/b.json": "newer"}


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "plan.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(DeviceError, match=r"plan.json: the disk is full \(\d+ bytes free in ") as refused:
        write_atomic(path, "new")
    assert refused.value.exit_code == 7
    assert below(tmp_path) == {"plan.json": "old"}


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX")
def test_a_file_that_the_system_cuts_short_leaves_the_old_one(tmp_path: Path):
    code = """
import resource, signal, sys
from pathlib import Path
from edgeflex.errors import EdgeflexError
from edgeflex.files import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomic(Path(sys.argv[1]), b"x" * 10000)
except EdgeflexError as error:
    print(error)
"""
    path = tmp_path / "plan.json"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "plan.json: File too large" in done.stdout
    assert below(tmp_path) == {"plan.json": "old"}


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "plan.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert below(tmp_path) == {"plan.json": "old"}


def test_writers_of_one_process_number_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Threads have one, and so have processes in containers that share a folder."""
    path = tmp_path / "plan.json"
    fsync = os.fsync
    others = [b"second"]

    def meanwhile(descriptor: int) -> None:
        if others:
            write_atomic(path, others.pop())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    write_atomic(path, b"first")
    assert below(tmp_path) == {"plan.json": "first"}


def test_a_name_as_long_as_the_file_system_takes_can_be_written(tmp_path: Path):
    name = "x" * 255
    write_atomic(tmp_path / name, "text")
    assert below(tmp_path) == {name: "text"}


@pytest.mark.parametrize("place", [".", "folder", "file/plan.json", "x" * 300, "a/" + "y" * 300])
def test_an_impossible_path_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("old")
    with pytest.raises(InputError) as refused:
        write_atomic(Path(place), "new")
    assert place[:40] in str(refused.value)
    assert below(tmp_path) == {"file": "old"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert pipe.is_fifo()


# --- reading --------------------------------------------------------------------------------------------


def test_reading_says_what_was_looked_for(tmp_path: Path):
    with pytest.raises(InputError, match=r"plan '.*none.json' does not exist"):
        read_bytes(tmp_path / "none.json", "plan")
    with pytest.raises(InputError, match="Is a directory"):
        read_bytes(tmp_path, "plan")


def test_text_is_read_and_bytes_that_are_none_are_named(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_bytes("naïve".encode())
    assert read_text(path, "prompt") == "naïve"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(InputError, match=r"text\.txt: byte 2 is not UTF-8 text.*iconv"):
        read_text(path, "prompt")
    with pytest.raises(InputError, match=r"prompt .* does not exist"):
        read_text(tmp_path / "absent.txt", "prompt")


def test_a_files_digest_is_its_sha256(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- folders ------------------------------------------------------------------------------------------


def test_a_folder_appears_whole(tmp_path: Path):
    out = tmp_path / "deep" / "bundle"
    with staged_folder(out, overwrite=False) as staging:
        (staging / "a").write_text("1")
        assert not out.exists()
    assert below(tmp_path) == {"deep/bundle/a": "1"}


def test_an_empty_folder_may_be_filled(tmp_path: Path):
    (tmp_path / "bundle").mkdir()
    with staged_folder(tmp_path / "bundle", overwrite=False) as staging:
        (staging / "a").write_text("1")
    assert below(tmp_path) == {"bundle/a": "1"}


def test_a_filled_folder_is_replaced_only_on_demand(tmp_path: Path):
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(InputError, match=r"not empty.*--overwrite"), staged_folder(out, overwrite=False):
        pytest.fail("the block must not run")
    with staged_folder(out, overwrite=True) as staging:
        (staging / "new").write_text("2")
        assert below(out) == {"old": "1"}
    assert below(tmp_path) == {"bundle/new": "2"}


def test_what_came_meanwhile_is_replaced_only_on_demand(tmp_path: Path):
    out = tmp_path / "bundle"
    with pytest.raises(InputError, match="not empty"), staged_folder(out, overwrite=False) as staging:  # noqa: PT012
        (staging / "mine").write_text("1")
        out.mkdir()
        (out / "another's").write_text("2")
    assert below(tmp_path) == {"bundle/another's": "2"}


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), ValueError("a bug"), InputError("bad")])
def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path, fault: BaseException):
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(type(fault)), staged_folder(out, overwrite=True) as staging:  # noqa: PT012
        (staging / "new").write_text("2")
        raise fault
    assert below(tmp_path) == {"bundle/old": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_full_disk_in_the_block_is_told_in_the_words_of_the_caller(tmp_path: Path):
    out = tmp_path / "bundle"
    with pytest.raises(DeviceError) as refused, staged_folder(out, overwrite=False) as staging:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(staging / "program.pte"))
    assert str(refused.value).startswith(f"{out / 'program.pte'}: the disk is full")
    assert list(tmp_path.iterdir()) == []


def test_a_swap_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "old").write_text("1")
    replace = Path.replace

    def refuse(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            full_disk()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(DeviceError), staged_folder(out, overwrite=True) as staging:
        (staging / "new").write_text("2")
    assert below(tmp_path) == {"bundle/old": "1"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "bundle").write_text("1")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is a file"):
            refuse_output(tmp_path / "bundle", overwrite=overwrite)


@pytest.mark.parametrize("place", [".", "..", "link"])
def test_the_folder_one_stands_in_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    here = tmp_path / "work" / "here"
    here.mkdir(parents=True)
    (here / "thesis.tex").write_text("1")
    (here / "link").symlink_to(tmp_path)
    monkeypatch.chdir(here)
    with pytest.raises(InputError, match="current or the home folder"):
        refuse_output(Path(place), overwrite=True)


def test_the_home_folder_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mail").write_text("1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(InputError, match="home folder"), staged_folder(tmp_path / "home", overwrite=True):
        pytest.fail("the block must not run")
    assert below(tmp_path) == {"home/mail": "1"}


def test_an_empty_current_folder_may_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with staged_folder(Path(), overwrite=False) as staging:
        (staging / "a").write_text("1")
    assert below(tmp_path) == {"here/a": "1"}


def test_the_free_bytes_are_those_of_the_nearest_folder_that_exists(tmp_path: Path):
    error = files.explain_os_error(OSError(errno.ENOSPC, "full"), tmp_path / "not" / "yet" / "plan.json")
    assert f"bytes free in {tmp_path})" in str(error)
