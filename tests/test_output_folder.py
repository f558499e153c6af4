"""Folders appear when they are complete; what can't be written is refused before; what was killed leaves nothing."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_python

from llama.convert import convert
from llama.errors import InputError
from llama.output_folder import check_free, exclusive, new_folder, output_path


def write(folder):
    with new_folder(folder) as temporary:
        (temporary / "file").write_text("content")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "out"
    with pytest.raises(ZeroDivisionError), new_folder(target) as temporary:
        (temporary / "file").write_text(f"half {1 / 0}")
    assert names(target.parent) == []
    with new_folder(target) as temporary:
        assert not target.exists()
        (temporary / "file").write_text("content")
    assert names(target.parent) == ["out"]
    assert names(target) == ["file"]
    with pytest.raises(InputError, match="out is there already; give the name of a new folder"), new_folder(target):
        pytest.fail("it should be refused before anything is written")
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_is_followed(tmp_path, exists):
    """What is written lies where the link leads, which may be another disk, and the link stays."""
    disk, link = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    if exists:
        (disk / "folder").mkdir()
    link.symlink_to(disk / "folder")
    with new_folder(link) as temporary:
        assert temporary.parent == disk
        (temporary / "file").write_text("content")
    assert link.is_symlink()
    assert (link / "file").read_text() == "content"
    assert names(disk) == ["folder"]
    assert names(tmp_path) == ["disk", "out"]


def test_a_link_in_a_path_is_followed_too(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_path("~/link/out") == tmp_path / "disk" / "out"
    write("~/link/out")
    assert names(tmp_path / "disk") == ["out"]


def test_paths_that_are_refused(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path / "circle", "circle"),
        ("/", "/ is there already"),
        ("", "is not a path"),
        (tmp_path / "file", "file is there already"),
    ):
        with pytest.raises(InputError, match=message):
            write(path)
    with pytest.raises(OSError, match=r"out can't be written into .*file"):
        write(tmp_path / "file" / "out")
    assert names(tmp_path) == ["circle", "file"]


MOUNTED = """
import subprocess, sys
from llama.output_folder import new_folder
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", sys.argv[1]], check=True)
try:
    with new_folder(sys.argv[1]):
        print("too late")
except ValueError as error:
    print(error)
with new_folder(sys.argv[1] + "/model") as folder:
    (folder / "file").touch()
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs Linux")
def test_a_mount_point_is_refused_before_anything_is_written(tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount anything")
    (tmp_path / "mounted").mkdir()
    command = ["unshare", "-rm", sys.executable, "-c", MOUNTED, tmp_path / "mounted"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "mounted can't be replaced by the finished folder" in run.stdout
    assert f"give the name of a new folder in it, such as {tmp_path / 'mounted' / 'model'}" in run.stdout
    assert "too late" not in run.stdout
    assert names(tmp_path) == ["mounted"]


@pytest.mark.parametrize(("error", "refused"), [(errno.EBUSY, True), (errno.EACCES, True), (errno.EXDEV, False)])
def test_an_empty_folder_is_tried_out(tmp_path, monkeypatch, error, refused):
    """A folder of a container's image can't be renamed (EXDEV), but it can be removed, which suffices."""
    (tmp_path / "out").mkdir()
    rename = Path.rename

    def fail(path, target):
        if path == tmp_path / "out":
            raise OSError(error, "no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    if refused:
        with pytest.raises(InputError, match=r"out can't be replaced by the finished folder \(no\)"):
            write(tmp_path / "out")
        assert names(tmp_path / "out") == []
    else:
        write(tmp_path / "out")
        assert names(tmp_path / "out") == ["file"]
    assert names(tmp_path) == ["out"]


def test_trying_an_empty_folder_out_leaves_it_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o750)
    before = (tmp_path / "out").stat()
    check_free(tmp_path / "out")
    after = (tmp_path / "out").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    leftover, others = ".a[1].unfinished-0123abcd", [".a[1].unfinished-mine", ".a1.unfinished-0123abcd", ".b.lock"]
    for name in (leftover, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".a[1].lock").write_text("123456")
    write(tmp_path / "a[1]")
    assert names(tmp_path) == sorted([*others, "a[1]"])


def test_what_a_conversion_left_that_was_killed_in_its_last_moment_is_removed(tmp_path, tiny_checkpoint):
    """Its folder is complete, and the next run is refused."""
    out = tmp_path / "out"
    convert(tiny_checkpoint, out)
    (tmp_path / ".out.lock").write_text("1")
    with pytest.raises(InputError, match="out is there already"):
        convert(tiny_checkpoint, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_writer_is_refused_and_disturbs_nothing(tmp_path):
    target = tmp_path / "out"
    with new_folder(target) as temporary:
        (temporary / "file").touch()
        with pytest.raises(InputError, match=r"out is being written by process \d+: wait until that has ended"):
            write(target)
        assert temporary.exists()
        write(tmp_path / "other")
    with exclusive(target), pytest.raises(InputError, match="is being written"), exclusive(target):
        pass
    assert names(tmp_path) == ["other", "out"]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, tiny_checkpoint):
    """Whatever the moment: nothing half, and nothing that is left after the next run. See the script."""
    writers = ["convert", "save", "download", "finetune", "text"]
    run = run_python(ROOT / "tests" / "kill_writers.py", tiny_checkpoint, tmp_path, "3", *writers, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count('"kills": 3') == len(writers)
