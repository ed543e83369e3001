"""A checkpoint in the making: what is replaced, what is left, how ranks come to the same end."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightsync.checkpoint import folder as module
from weightsync.checkpoint.files import read_checkpoint
from weightsync.checkpoint.folder import PartialFolder
from weightsync.checkpoint.model import Entry
from weightsync.checkpoint.side import INDEX_NAME
from weightsync.errors import CheckpointError, ConfigError, TransferTimeoutError
from weightsync.ir.dtypes import Dtype

EXPECTED = {"a": Entry("a", Dtype.F32, (3,))}


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def old_checkpoint(path: Path) -> None:
    path.mkdir()
    save_file({"a": torch.zeros(3)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")


def is_old(path: Path) -> bool:
    (stored,) = read_checkpoint(path).files
    return stored.read_bytes().endswith(bytes(12))


def test_only_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out"

    def refused(message: str, *, overwrite: bool = True, **options: Any) -> None:
        before = tree(tmp_path)
        with pytest.raises(ConfigError, match=message):
            PartialFolder(path, 0, 1, overwrite=overwrite, **options)
        assert tree(tmp_path) == before

    with pytest.raises(ConfigError, match="there is no folder"):
        PartialFolder(path / "deeper", 0, 1, overwrite=False)
    path.mkdir()
    PartialFolder(path, 0, 1, overwrite=False).discard()  # an empty folder may be taken
    (path / "thesis.txt").write_text("years of work")
    refused("is there already", overwrite=False)
    refused("is no checkpoint .no ")
    (path / "model.safetensors").write_bytes(b"")
    refused("'thesis.txt' in it is no part of a checkpoint .* move it away, or name another")
    # The new one has such a file itself: a copy of the old one's, or meant to take its place.
    PartialFolder(path, 0, 1, overwrite=True, side_names={"thesis.txt"}).discard()
    (path / "thesis.txt").unlink()
    (path / "runs").mkdir()
    refused("'runs' in it")
    refused("'runs' in it", side_names={"runs"})
    (path / "runs").rmdir()
    PartialFolder(path, 0, 1, overwrite=True).discard()
    (path / "other.safetensors").write_bytes(b"")
    refused(f"2 of them without {INDEX_NAME}")  # a collection of files, no checkpoint
    (path / INDEX_NAME).write_bytes(b"")
    PartialFolder(path, 0, 1, overwrite=True).discard()
    shutil.rmtree(path)
    path.symlink_to(tmp_path)
    refused("no folder")


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"],
)
def test_a_trainers_checkpoint_is_not_replaced(tmp_path: Path, name: str) -> None:
    path = tmp_path / "checkpoint-500"
    old_checkpoint(path)
    (path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=f"{name!r} in it"):
        PartialFolder(path, 0, 1, overwrite=True, side_names={"config.json", "README.md"})
    assert tree(tmp_path) == sorted(
        [path.name, *(f"{path.name}/{n}" for n in ("config.json", "model.safetensors", name))]
    )


def test_what_comes_to_lie_there_meanwhile_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "out"
    old_checkpoint(path)
    folder = PartialFolder(path, 0, 1, overwrite=True)
    save_file({"a": torch.ones(3)}, folder.own / "model.safetensors")
    folder.hand_over(1, ["model.safetensors"])
    (path / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"optimizer\.pt"):
        folder.finish(1, EXPECTED, deadline=0.0)
    folder.discard()
    assert is_old(path)
    assert tree(tmp_path) == ["out", "out/config.json", "out/model.safetensors", "out/optimizer.pt"]


def test_two_at_once_are_refused_and_leftovers_removed(tmp_path: Path) -> None:
    path = tmp_path / "out"
    first = PartialFolder(path, 0, 1, overwrite=False)
    with pytest.raises(ConfigError, match="another export"):
        PartialFolder(path, 0, 1, overwrite=False)
    (first.own / "model.safetensors").write_bytes(b"half")
    second = PartialFolder(path, 1, 2, overwrite=False)
    first.discard()
    assert second.own.is_dir()
    second.discard()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.partial" / "rank-0").mkdir(parents=True)
    (tmp_path / ".out.partial" / "rank-0" / "done.json").write_text("{}")  # of a killed process
    third = PartialFolder(path, 0, 1, overwrite=False)
    assert sorted(child.name for child in third.own.iterdir()) == ["run", "side"]
    third.discard()
    assert list(tmp_path.iterdir()) == []


def test_the_old_checkpoint_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    old_checkpoint(path)
    for can_exchange in (True, False):
        if not can_exchange:
            monkeypatch.setattr("weightsync.checkpoint.folder._exchange", lambda *_: False)
        folder = PartialFolder(path, 0, 1, overwrite=True)
        save_file({"b": torch.ones(3)}, folder.own / "model.safetensors")
        folder.hand_over(1, ["model.safetensors"])
        with pytest.raises(CheckpointError, match="not the files that were meant"):
            folder.finish(1, EXPECTED, deadline=0.0)
        folder.discard()
        assert list(read_checkpoint(path).tensors) == ["a"]
        folder = PartialFolder(path, 0, 1, overwrite=True)
        save_file({"a": torch.ones(3)}, folder.own / "model.safetensors")
        (folder.side / "vocab.txt").write_text("")
        folder.hand_over(1, ["model.safetensors"])
        folder.finish(1, EXPECTED, deadline=0.0)
        assert (path / "vocab.txt").exists()
        assert [child.name for child in tmp_path.iterdir()] == ["out"]
        (path / "vocab.txt").unlink()


class Killed(BaseException):
    """Ends a process at a place that a test chooses."""


def rename_fails(
    monkeypatch: pytest.MonkeyPatch, path: Path, error: type[BaseException], *, first: bool
) -> None:
    """Make the first or the second rename of a replacement fail, after it was done or not."""
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if first and self == path:
            real(self, target)
            raise error
        if not first and target == path and self.name == "side":
            raise error
        return real(self, target)

    monkeypatch.setattr(module, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_replacement_gives_the_old_one_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], first: bool
) -> None:
    path = tmp_path / "out"
    old_checkpoint(path)
    folder = PartialFolder(path, 0, 1, overwrite=True)
    save_file({"a": torch.ones(3)}, folder.own / "model.safetensors")
    folder.hand_over(1, ["model.safetensors"])
    with monkeypatch.context() as patched:
        rename_fails(patched, path, error, first=first)
        with pytest.raises(CheckpointError if error is OSError else error):
            folder.finish(1, EXPECTED, deadline=0.0)
        assert is_old(path)
    folder.discard()
    assert is_old(path)
    assert tree(tmp_path) == ["out", "out/config.json", "out/model.safetensors"]


def killed_between_renames(path: Path) -> Path:
    """What lies there if the process is killed when the old one is aside; returns where."""
    old_checkpoint(path)
    own = path.parent / f".{path.name}.partial" / "rank-0"
    old_checkpoint(own.parent / "side")
    own.mkdir()
    (own.parent / "side").rename(own / "side")
    path.rename(own / "old")
    return own / "old"


@pytest.mark.parametrize("overwrite", [True, False])
def test_after_a_kill_the_old_one_gets_its_name_back(tmp_path: Path, overwrite: bool) -> None:
    path = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()
    killed_between_renames(path)
    if overwrite:
        folder = PartialFolder(path, 0, 1, overwrite=True)
        assert is_old(path)
        folder.discard()
    else:  # nobody allowed to replace it
        with pytest.raises(ConfigError, match="is there already"):
            PartialFolder(path, 0, 1, overwrite=False)
    assert is_old(path)
    assert tree(tmp_path) == ["out", "out/config.json", "out/model.safetensors"]


def test_discard_gives_the_old_one_its_name_back(tmp_path: Path) -> None:
    """An interrupt may come where nothing catches it but `discard`."""
    path = tmp_path / "out"
    old_checkpoint(path)
    folder = PartialFolder(path, 0, 1, overwrite=True)
    path.rename(folder.own / "old")
    folder.discard()
    assert is_old(path)
    assert tree(tmp_path) == ["out", "out/config.json", "out/model.safetensors"]


def test_the_only_copy_of_the_old_one_is_never_removed(tmp_path: Path) -> None:
    """Another program took the name while it was free."""
    path = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()
    old = killed_between_renames(path)
    old_checkpoint(path)
    for _ in range(2):  # no lock is left behind either
        with pytest.raises(CheckpointError, match=r"rank-0/old now; move it to where"):
            PartialFolder(path, 0, 1, overwrite=True)
        assert is_old(old)
    shutil.rmtree(path)
    folder = PartialFolder(path, 0, 1, overwrite=True)
    assert is_old(path)
    path.rename(old)
    path.mkdir()
    (path / "x").touch()
    folder.discard()
    assert is_old(old)


def test_a_new_one_in_place_is_not_undone(tmp_path: Path) -> None:
    """Killed after the second rename: what was put aside is of no use any more."""
    path = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()
    old = killed_between_renames(path)
    (old.parent / "side").rename(path)
    (path / "vocab.txt").touch()
    PartialFolder(path, 0, 1, overwrite=True).discard()
    assert tree(tmp_path) == ["out", "out/config.json", "out/model.safetensors", "out/vocab.txt"]


def test_what_cannot_be_cleared_is_an_error_without_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    own = tmp_path / ".out.partial" / "rank-0"
    own.mkdir(parents=True)
    (own / "left").touch()
    with monkeypatch.context() as patched:

        def refuse(_: Path) -> None:
            raise PermissionError(13, "Permission denied")

        patched.setattr(module, "remove", refuse)
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"cannot be cleared of .* Permission denied"):
                PartialFolder(path, 0, 1, overwrite=False)
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    PartialFolder(path, 0, 1, overwrite=False).discard()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.partial").touch()
    with pytest.raises(CheckpointError, match="cannot be made"):
        PartialFolder(path, 0, 1, overwrite=False)


def test_a_finished_export_leaves_the_next_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one of that name begins the moment that the lock is given up."""
    path = tmp_path / "out"
    folder = PartialFolder(path, 0, 1, overwrite=False)
    save_file({"a": torch.ones(3)}, folder.own / "model.safetensors")
    folder.hand_over(1, ["model.safetensors"])
    begun: list[PartialFolder] = []
    close = os.close

    def close_and_begin(descriptor: int) -> None:
        close(descriptor)
        if descriptor == folder._lock and not begun:
            begun.append(PartialFolder(path, 0, 1, overwrite=True))
            (begun[0].own / "model.safetensors").write_bytes(b"new")

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", close_and_begin)
        folder.finish(1, EXPECTED, deadline=0.0)
    assert (begun[0].own / "model.safetensors").read_bytes() == b"new"
    begun[0].discard()
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def test_a_lock_is_on_the_folder_that_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before removes its folder between our opening and our locking it."""
    path = tmp_path / "out"
    first = PartialFolder(path, 0, 1, overwrite=False)
    opened = os.open
    is_ended = False

    def open_late(name: Any, *arguments: Any, **options: Any) -> int:
        nonlocal is_ended
        descriptor = opened(name, *arguments, **options)
        if Path(name) == first.own and not is_ended:
            is_ended = True
            first.discard()
        return descriptor

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", open_late)
        second = PartialFolder(path, 0, 1, overwrite=False)
    assert is_ended
    with pytest.raises(ConfigError, match="another export"):
        PartialFolder(path, 0, 1, overwrite=False)
    second.discard()
    assert list(tmp_path.iterdir()) == []


def two_ranks(path: Path) -> tuple[PartialFolder, PartialFolder]:
    """Rank 0 writes tensor a, rank 1 tensor b."""
    folders = [PartialFolder(path, rank, 2, overwrite=False) for rank in range(2)]
    for rank, folder in enumerate(folders):
        save_file({"ab"[rank]: torch.ones(3)}, folder.own / f"model-{rank}.safetensors")
    weight_map = '{"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}'
    (folders[0].side / INDEX_NAME).write_text(weight_map)
    return folders[0], folders[1]


def end(folder: PartialFolder, rank: int, timeout_s: float = 10.0) -> None:
    """What `CheckpointSink.write` does in the end."""
    try:
        folder.hand_over(1, [f"model-{rank}.safetensors"])
        expected = {name: Entry(name, Dtype.F32, (3,)) for name in "ab"}
        folder.finish(1, expected, time.monotonic() + timeout_s)
    except BaseException:
        folder.discard()
        raise


def test_other_ranks_wait_until_rank_0_gave_the_name(tmp_path: Path) -> None:
    path = tmp_path / "out"
    first, second = two_ranks(path)
    (tmp_path / ".out.partial" / "rank-7").mkdir()  # a killed export by eight left it
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(end, second, 1)
        time.sleep(0.2)
        assert not waiting.done()
        with pytest.raises(ConfigError, match="rank 1 of another export"):
            PartialFolder(path, 1, 2, overwrite=False)
        end(first, 0)
        waiting.result(10)
    assert len(read_checkpoint(path).files) == 2
    assert [child.name for child in tmp_path.iterdir()] == ["out"]
    # A part that a later export made meanwhile is none of theirs.
    later = PartialFolder(path, 1, 2, overwrite=True)
    second.discard()
    assert later.own.is_dir()
    later.discard()


def gives_up_early(first: PartialFolder, second: PartialFolder) -> None:
    first.discard()


def gives_up_late(first: PartialFolder, second: PartialFolder) -> None:
    threading.Timer(0.2, first.discard).start()


def gives_up_with_the_files(first: PartialFolder, second: PartialFolder) -> None:
    def fail() -> None:
        (second.own / "model-1.safetensors").rename(first.side / "model-1.safetensors")
        first.discard()

    threading.Timer(0.2, fail).start()


def starts_again(first: PartialFolder, second: PartialFolder) -> None:
    def again() -> None:
        first.discard()
        PartialFolder(first.path, 0, 2, overwrite=False)

    threading.Timer(0.2, again).start()


@pytest.mark.parametrize(
    "how", [gives_up_early, gives_up_late, gives_up_with_the_files, starts_again]
)
def test_if_rank_0_gives_up_the_others_fail_and_leave_nothing(
    tmp_path: Path, how: Callable[[PartialFolder, PartialFolder], None]
) -> None:
    first, second = two_ranks(tmp_path / "out")
    how(first, second)
    with pytest.raises(CheckpointError, match="rank 0 gave up") as caught:
        end(second, 1)
    assert caught.value.rank == 0
    assert not second.own.exists()
    if how is not starts_again:
        assert list(tmp_path.iterdir()) == []


def test_if_rank_0_was_killed_the_others_fail_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.1)
    first, second = two_ranks(tmp_path / "out")
    with pytest.raises(TransferTimeoutError, match="rank 0 has not completed") as caught:
        end(second, 1, timeout_s=0.2)
    assert caught.value.rank == 0
    assert not second.own.exists()
    first.discard()
    assert list(tmp_path.iterdir()) == []


def test_rank_0_waits_for_the_others_until_the_deadline(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path / "out")
    with pytest.raises(TransferTimeoutError, match="rank 1 has not brought its files") as caught:
        end(first, 0, timeout_s=0.1)
    assert caught.value.rank == 1
    second.discard()
    assert list(tmp_path.iterdir()) == []


def test_there_is_no_checkpoint_if_a_rank_gave_up_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two_ranks(tmp_path / "out")
    second.hand_over(1, ["model-1.safetensors"])

    def read_slowly(path: Path) -> Any:
        second.discard()
        return read_checkpoint(path)

    monkeypatch.setattr(module, "read_checkpoint", read_slowly)
    with pytest.raises(CheckpointError, match="rank 1 gave up") as caught:
        end(first, 0)
    assert caught.value.rank == 1
    assert list(tmp_path.iterdir()) == []
