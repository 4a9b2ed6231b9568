"""Files that are replaced whole, and locks."""

import os

import pytest

from pixelgen.files import lock, partial, replacing, write_whole


def test_small_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_whole(path, "seed: 1\n")

    def killed(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "seed: 2\n")
    assert path.read_text() == "seed: 1\n"


@pytest.mark.parametrize(("mode", "content"), [("w", "a\r\nb\n"), ("wb", b"a\r\nb\n\xff")])
def test_what_is_written_takes_the_place_of_the_file(tmp_path, mode, content):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    partial(path).write_bytes(b"left by a process that was killed")
    with replacing(path, mode) as file:
        file.write(content)
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == (content if mode == "wb" else content.encode())
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_file_is_all_there_is(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_content_and_name_are_on_the_disk_in_this_order(tmp_path, monkeypatch):
    path, flushed, fsync = tmp_path / "file", [], os.fsync

    def noting(descriptor):
        flushed.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    write_whole(path, "text")
    assert flushed == [(str(partial(path)), False), (str(tmp_path), True)]


def test_a_lock_is_held_until_its_file_is_closed(tmp_path):
    folder, other = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    assert lock(folder) and not lock(other)
    os.close(folder)
    assert lock(other)
    os.close(other)
