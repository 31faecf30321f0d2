import os
import signal
import subprocess
import sys

import pytest

from hf_msn.files import check_new_folder, public_name, read_json, whole_file, whole_folder, write_json


def _names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "state.json"
    write_json(path, {"step": 1, "name": "\u00fc"})
    with pytest.raises(RuntimeError), whole_file(path, overwrite=True) as staging:
        staging.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"step": 1, "name": "\u00fc"} and _names(path.parent) == ["state.json"]
    write_json(path, {"step": 2})
    assert read_json(path) == {"step": 2}
    with pytest.raises(ValueError, match=r"state\.json"), whole_file(path):
        pass


@pytest.mark.slow
def test_kill_before_the_rename_leaves_the_old_file_and_the_next_write_succeeds(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})
    program = f"""
import os, signal
from hf_msn.files import whole_file
with whole_file({str(path)!r}, overwrite=True) as staging:
    staging.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -signal.SIGKILL
    assert read_json(path) == {"step": 1} and len(_names(tmp_path)) == 2
    write_json(path, {"step": 2})
    assert read_json(path) == {"step": 2} and _names(tmp_path) == ["state.json"]


def test_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "runs" / "export"
    with pytest.raises(RuntimeError), whole_folder(path) as staging:
        (staging / "a").write_text("1")
        raise RuntimeError
    assert _names(tmp_path) == []  # parents that were made for it, too
    with whole_folder(path) as staging:
        (staging / "a").write_text("1")
        assert not path.exists()
    assert _names(path) == ["a"] and _names(path.parent) == ["export"]


def test_places_that_hold_something_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for name in ("full", "full/a", "link"):
        with pytest.raises(ValueError, match=name):
            check_new_folder(tmp_path / name)
    with pytest.raises(ValueError, match="writable"), whole_folder(tmp_path / "full" / "a" / "b"):
        pass


def test_unreadable_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "absent.json"):
        with pytest.raises(ValueError, match=name):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("digits", "digits"),
        ("train[:10%]", "train[:10%]"),
        ("ILSVRC/imagenet-1k", "ILSVRC/imagenet-1k"),
        ("/data/shards/train-*.parquet", "shards"),
        ("../alice/cats/", "cats"),
        ("C:\\Users\\Alice\\pets", "pets"),
        ("https://host/a/weights.pth?key=1", "weights.pth"),
        ("timm:/home/alice/net", "net"),
        *((nameless, "(local)") for nameless in ("~bob", "~", "../..", "D:\\", "/")),
    ],
)
def test_a_source_is_published_by_its_last_component(source, name):
    assert public_name(source) == name == public_name(public_name(source))


def test_a_local_folder_is_no_hub_id_and_a_home_folder_has_no_name(tmp_path, monkeypatch):
    (tmp_path / "alice" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    assert public_name("alice/cats") == "cats" and public_name(tmp_path / "alice") == public_name("~") == "(local)"
