"""Output directories are either whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command import in_another_process, waiting_process
from safetensors import SafetensorError

from secateur import locking
from secateur.errors import MaskError, NumericalError, OutputError
from secateur.evaluation.store import Store
from secateur.files import LOCK, MEASURED, TEMPORARY, OutputDirectory, has_measured, to_json, write_text, writing


def tree(directory: Path) -> dict[str, str]:
    """Every file below a directory, hidden ones included, with its text."""
    return {str(f.relative_to(directory)): f.read_text() for f in sorted(directory.rglob("*")) if f.is_file()}


def nothing() -> None:
    pass


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def write_run(target: Path, overwrite: bool = False, then: Callable[[], object] = nothing) -> None:
    """Write one file, then do something else before the directory is published."""
    with writing(OutputDirectory.open(target, overwrite)) as output:
        assert output is not None
        (output.staging / "a.txt").write_text("new")
        then()


def old_run(parent: Path) -> Path:
    target = parent / "run"
    target.mkdir()
    (target / "a.txt").write_text("old")
    (target / "gone.txt").write_text("old")
    return target


def test_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "run"
    seen: list[bool] = []
    write_run(target, then=lambda: seen.append(target.exists()))
    assert seen == [False]
    assert tree(tmp_path) == {"deep/er/run/a.txt": "new"}


def test_existing_directory_is_refused_without_overwrite(tmp_path: Path) -> None:
    target = old_run(tmp_path)
    with pytest.raises(OutputError, match="exists; name another directory or add --overwrite"):
        OutputDirectory.open(target)
    assert tree(tmp_path) == {"run/a.txt": "old", "run/gone.txt": "old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_overwrite_replaces_only_at_the_end(tmp_path: Path) -> None:
    target = old_run(tmp_path)
    seen: list[dict[str, str]] = []
    write_run(target, overwrite=True, then=lambda: seen.append(tree(target)))
    assert seen == [{"a.txt": "old", "gone.txt": "old"}]
    assert tree(tmp_path) == {"run/a.txt": "new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("error", [ValueError("x"), MaskError("x"), SystemExit(2)], ids=lambda e: type(e).__name__)
def test_an_error_leaves_nothing_behind(error: BaseException, tmp_path: Path) -> None:
    target = old_run(tmp_path)
    with pytest.raises(type(error)):
        write_run(target, overwrite=True, then=failing(error))
    assert tree(tmp_path) == {"run/a.txt": "old", "run/gone.txt": "old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(("figures", "kept"), [({}, False), ({"y": np.ones(2)}, True)])
def test_an_error_of_the_user_s_keeps_what_a_run_has_measured(
    figures: dict[str, np.ndarray], kept: bool, tmp_path: Path
) -> None:
    def run(name: str, carry_on: bool) -> None:
        with writing(OutputDirectory.open(tmp_path / name, carry_on=carry_on), carry_on=carry_on) as output:
            assert output is not None
            with Store(output.staging / MEASURED, "model") as store:
                store.put("select", b"mask", figures)
            raise NumericalError("not finite")

    with pytest.raises(NumericalError):
        run("run", carry_on=True)
    with pytest.raises(NumericalError):
        run("other", carry_on=False)
    assert [path.name for path in tmp_path.iterdir()] == (["run.partial"] if kept else [])


def test_a_store_that_cannot_be_read_is_kept(tmp_path: Path) -> None:
    (tmp_path / MEASURED).write_bytes(b"damaged, and perhaps to be saved" * 9)
    assert has_measured(tmp_path)
    assert not has_measured(tmp_path / "none")


def test_an_interrupt_keeps_the_partial_directory(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_run(tmp_path / "run", then=failing(KeyboardInterrupt()))
    assert tree(tmp_path) == {"run.partial/a.txt": "new"}


def test_files_in_the_partial_directory_are_removed_only_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"run\.partial' holds files, and no run that can be carried on"):
        write_run(tmp_path / "run")
    assert tree(tmp_path) == {"run.partial/mine.txt": "mine"}
    write_run(tmp_path / "run", overwrite=True)
    assert tree(tmp_path) == {"run/a.txt": "new"}


@pytest.mark.parametrize("left", [(), (f"{TEMPORARY}abc",)])
def test_an_empty_partial_directory_is_in_nobody_s_way(left: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "run.partial").mkdir()
    for name in left:
        (tmp_path / "run.partial" / name).write_text("half of a fi")
    write_run(tmp_path / "run")
    assert tree(tmp_path) == {"run/a.txt": "new"}


def test_no_output_passes_errors_on() -> None:
    with writing(None) as output:
        assert output is None
    with pytest.raises(FileNotFoundError), writing(None):
        raise FileNotFoundError


@pytest.mark.parametrize("where", [".", "..", "/"])
def test_the_current_directory_is_never_replaced(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "precious.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(OutputError, match="holds the current directory"):
        OutputDirectory.open(where, overwrite=True)
    assert tree(tmp_path) == {"work/precious.txt": "mine"}


def test_the_current_directory_by_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "precious.txt").write_text("mine")
    (tmp_path / "link").symlink_to("work")
    monkeypatch.chdir(tmp_path / "work")
    for name in (tmp_path / "link", Path("../work"), tmp_path / "link" / ".." / "work"):
        with pytest.raises(OutputError, match="holds the current directory"):
            OutputDirectory.open(name, overwrite=True)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OutputError, match="is a file"):
        OutputDirectory.open(tmp_path / "run", overwrite=True)
    with pytest.raises(OutputError, match="cannot be written"):
        OutputDirectory.open(tmp_path / "run" / "below")
    assert tree(tmp_path) == {"run": "a file"}


def test_a_file_where_the_partial_directory_goes(tmp_path: Path) -> None:
    (tmp_path / "run.partial").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"):
        OutputDirectory.open(tmp_path / "run")
    assert tree(tmp_path) == {"run.partial": "a file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_parent(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        OutputDirectory.open(tmp_path / "run")


def test_refused_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"run' cannot be written: Permission denied\."):
        OutputDirectory.open(tmp_path / "run")


def test_a_disk_without_room_is_found_at_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_500_000_000))
    with pytest.raises(OutputError, match=r"has 1\.5 GB free, but about 2\.0 GB are needed"):
        OutputDirectory.open(tmp_path / "run", needed_bytes=2_000_000_000)
    assert list(tmp_path.iterdir()) == []
    OutputDirectory.open(tmp_path / "run", needed_bytes=1_000_000_000).discard()
    assert list(tmp_path.iterdir()) == []


NO_ROOM = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", NO_ROOM, ids=lambda error: type(error).__name__)
def test_a_disk_that_fills_up_while_writing(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device"):
        write_run(tmp_path / "run", then=failing(error))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_publication_keeps_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = old_run(tmp_path)
    rename = Path.rename

    def refuse_new(self: Path, to: Path) -> Path:
        if self.name == "run.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(OutputError, match=r"Input/output error; the results are in .*run\.partial'"):
        write_run(target, overwrite=True)
    assert tree(tmp_path) == {"run/a.txt": "old", "run/gone.txt": "old", "run.partial/a.txt": "new"}
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "run.partial"}


def test_a_directory_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"appeared meanwhile .*; the results are in .*run\.partial'"):
        write_run(tmp_path / "run", then=lambda: old_run(tmp_path))
    assert tree(tmp_path) == {"run/a.txt": "old", "run/gone.txt": "old", "run.partial/a.txt": "new"}


# Other processes, and kills


def hold(target: Path, parent: Connection) -> None:
    with writing(OutputDirectory.open(target)) as output:
        assert output is not None
        (output.staging / "a.txt").write_text("held")
        parent.send("held")
        with suppress(EOFError):
            parent.recv()


@contextmanager
def held(target: Path) -> Iterator[BaseProcess]:
    """Another process that writes a directory while the context lasts."""
    with waiting_process(hold, target, says="held") as process:
        yield process


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_another_process_is_writing_is_left_alone(overwrite: bool, tmp_path: Path) -> None:
    with held(tmp_path / "run") as process:
        refused = rf"run' is being written by another process \(PID {process.pid} on .*\); wait until it is done"
        with pytest.raises(OutputError, match=refused):
            OutputDirectory.open(tmp_path / "run", overwrite, carry_on=True)
        assert (tmp_path / "run.partial" / "a.txt").read_text() == "held"
    assert process.exitcode == 0
    assert tree(tmp_path) == {"run/a.txt": "held"}


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    with held(tmp_path / "run") as process:
        process.kill()
        process.join()
    write_run(tmp_path / "run", overwrite=True)
    assert tree(tmp_path) == {"run/a.txt": "new"}


def test_a_process_does_not_write_a_directory_twice_at_once(tmp_path: Path) -> None:
    def again() -> None:
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=f"PID {os.getpid()} "):
                write_run(tmp_path / "run", overwrite)

    write_run(tmp_path / "run", then=again)
    assert tree(tmp_path) == {"run/a.txt": "new"}
    write_run(tmp_path / "run", overwrite=True)


def test_what_another_process_has_published_by_the_time_of_the_lock_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = locking._take

    def publish_first(path: Path) -> int | None:
        monkeypatch.setattr(locking, "_take", take)
        path.parent.rename(tmp_path / "run")
        return take(path)

    monkeypatch.setattr(locking, "_take", publish_first)
    with pytest.raises(OutputError, match="exists; name another directory"):
        OutputDirectory.open(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_lock_on_a_file_that_has_gone_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = locking._take

    def lose_it(path: Path) -> int | None:
        monkeypatch.setattr(locking, "_take", take)
        handle = take(path)
        path.unlink()
        return handle

    monkeypatch.setattr(locking, "_take", lose_it)
    lock = locking.Lock.take(tmp_path / "run.partial", LOCK)
    assert locking.holder_of(lock.path) is not None
    lock.release()
    assert locking.holder_of(lock.path) is None
    assert not lock.path.exists()


@pytest.mark.parametrize("missing", ["module", "in the file system"])
def test_where_there_are_no_locks_nothing_is_locked(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if missing == "module":
        monkeypatch.setattr(locking, "fcntl", None)
    else:
        monkeypatch.setattr(locking.fcntl, "flock", refuse)
    seen: list[dict[str, str]] = []
    write_run(tmp_path / "run", then=lambda: seen.append(tree(tmp_path)))
    assert seen == [{"run.partial/a.txt": "new"}]
    assert tree(tmp_path) == {"run/a.txt": "new"}


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def replace_and_die(target: Path, moment: str) -> None:
    """Put another directory in the place of one; a kill comes at a moment of that."""
    rename, renamed = Path.rename, list[Path]()

    def renaming(self: Path, to: Path) -> Path:
        if moment == f"before rename {len(renamed) + 1}":
            die()
        renamed.append(to)
        return rename(self, to)

    def removing(directory: Path, **_: Any) -> None:
        for file in directory.glob("*"):
            file.unlink()
            die()

    with writing(OutputDirectory.open(target, overwrite=True)) as output, pytest.MonkeyPatch.context() as patch:
        assert output is not None
        (output.staging / "a.txt").write_text("newer")
        patch.setattr(Path, "rename", renaming)
        if moment == "while the old one is removed":
            patch.setattr(shutil, "rmtree", removing)
        output.publish()


def killed(target: Path, moment: str) -> None:
    process = in_another_process(replace_and_die, target, moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL


OLD, NEW = {"a.txt": "old", "gone.txt": "old"}, {"a.txt": "newer"}


@pytest.mark.parametrize(
    ("moment", "stays"),
    [
        ("before rename 1", OLD),
        ("before rename 2", OLD),
        ("before rename 3", NEW),
        ("while the old one is removed", NEW),
    ],
)
def test_a_kill_while_a_directory_is_replaced_loses_nothing(moment: str, stays: dict[str, str], tmp_path: Path) -> None:
    target = old_run(tmp_path)
    killed(target, moment)
    with pytest.raises(OutputError, match="exists; name another directory or add --overwrite"):
        OutputDirectory.open(target, carry_on=True)
    assert {name: text for name, text in tree(target).items() if name != LOCK} == stays
    write_run(target, overwrite=True)
    assert tree(tmp_path) == {"run/a.txt": "new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_half_of_an_older_directory_does_not_come_back(tmp_path: Path) -> None:
    target = old_run(tmp_path)
    killed(target, "while the old one is removed")
    shutil.rmtree(target)
    write_run(target)
    assert tree(tmp_path) == {"run/a.txt": "new"}


def test_files_that_a_kill_left_half_written_are_not_published(tmp_path: Path) -> None:
    (tmp_path / "run.partial" / "plans").mkdir(parents=True)
    for directory in (tmp_path / "run.partial", tmp_path / "run.partial" / "plans"):
        (directory / f"{TEMPORARY}abc").write_text("half of a fi")
    with writing(OutputDirectory.open(tmp_path / "run", carry_on=True), carry_on=True) as output:
        assert output is not None
        (output.staging / "a.txt").write_text("new")
    assert tree(tmp_path) == {"run/a.txt": "new"}


def test_a_link_is_followed(tmp_path: Path) -> None:
    target = old_run(tmp_path)
    (tmp_path / "link").symlink_to("run")
    write_run(tmp_path / "link", overwrite=True)
    assert tree(target) == {"a.txt": "new"}
    assert (tmp_path / "link").is_symlink()


def test_json_file(tmp_path: Path) -> None:
    with writing(OutputDirectory.open(tmp_path / "run")) as output:
        assert output is not None
        output.write_json("a.json", {"value": np.float32(0.5)})
        assert {entry.name for entry in output.staging.iterdir()} == {"a.json", LOCK}
    assert json.loads((tmp_path / "run" / "a.json").read_text()) == {"value": 0.5}


def test_to_json_writes_plain_values() -> None:
    content = {
        "nan": float("nan"),
        "infinite": [np.inf, -np.inf, np.float32("nan")],
        "numpy": (np.int64(3), np.float32(0.5), np.bool_(True)),
        "array": np.array([[1.0, np.nan], [2.5, 3.0]]),
        "flags": np.array([True, False]),
        "integers": np.arange(2),
        7: "Zoë",
        "nothing": None,
        "true": True,
        "nested": {"deep": [{"x": np.float64("-inf")}]},
    }
    text = to_json(content)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "nan": None,
        "infinite": [None, None, None],
        "numpy": [3, 0.5, True],
        "array": [[1.0, None], [2.5, 3.0]],
        "flags": [True, False],
        "integers": [0, 1],
        "7": "Zoë",
        "nothing": None,
        "true": True,
        "nested": {"deep": [{"x": None}]},
    }
    assert "Zoë" in text
    assert text.endswith("}\n")


def test_to_json_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError):
        to_json({"x": object()})


def test_write_text_replaces_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    seen = []
    replace = os.replace

    def watch(source: Any, to: Any) -> None:
        seen.append((Path(source).read_text(encoding="utf-8"), path.read_text(), Path(source).parent == tmp_path))
        replace(source, to)

    monkeypatch.setattr(os, "replace", watch)
    write_text(path, "new é")
    assert seen == [("new é", "old", True)]
    assert path.read_text(encoding="utf-8") == "new é"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_what_write_text_wrote_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def watch(handle: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append(("sync", place.read_text() if place.is_file() else str(place)))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    monkeypatch.setattr(os, "replace", lambda source, to: (done.append(("name", str(to))), replace(source, to)))
    write_text(tmp_path / "a.txt", "whole")
    assert done == [("sync", "whole"), ("name", str(tmp_path / "a.txt")), ("sync", str(tmp_path))]


def test_write_text_keeps_the_old_text_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert tree(tmp_path) == {"a.txt": "old"}
