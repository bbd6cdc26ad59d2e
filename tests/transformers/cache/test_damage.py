"""A damaged or missing file of a cache is named, and made anew once it is deleted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from kdkernels.errors import CommandError
from kdkernels.transformers.cache import TopKCache, write_cache
from kdkernels.transformers.cache.manifest import shard_name
from tests.support.caches import EXAMPLES, OPTIONS, content


def flip(path: Path, place: float) -> None:
    harmed = bytearray(path.read_bytes())
    harmed[int(place * (len(harmed) - 1))] ^= 1
    path.write_bytes(harmed)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def look_everywhere(folder: Path) -> None:
    cache = TopKCache(folder)
    for example in EXAMPLES:
        cache.lookup(example["input_ids"])


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "index.safetensors", "manifest.json"])
@pytest.mark.parametrize(
    "harm", [lambda path: flip(path, 0.4), lambda path: flip(path, 0.99), cut], ids=["bit", "last bits", "cut"]
)
def test_a_damaged_file_is_named_and_made_anew_once_deleted(
    llama: Any, whole: Path, folder: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(folder / name)
    with pytest.raises(CommandError) as caught:
        look_everywhere(folder)
    assert str(caught.value).startswith(f"{folder / name} is damaged (")
    if name != "index.safetensors":  # that is written anew in any case
        with pytest.raises(CommandError) as caught:
            write_cache(llama, EXAMPLES, folder, **OPTIONS)
        assert str(caught.value).startswith(f"{folder / name} is damaged (")
    (folder / name).unlink()
    write_cache(llama, EXAMPLES, folder, **OPTIONS)
    assert content(folder) == content(whole)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "shard-00002.safetensors", "index.safetensors", "manifest.json"])
def test_a_missing_file_is_named_and_made_anew(llama: Any, whole: Path, folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CommandError) as caught:
        TopKCache(folder)
    assert str(caught.value).startswith(f"{folder / name} is missing")
    write_cache(llama, EXAMPLES, folder, **OPTIONS)
    assert content(folder) == content(whole)


def test_a_shard_that_goes_missing_later_is_named(folder: Path) -> None:
    cache = TopKCache(folder)
    (folder / shard_name(2)).unlink()
    cache.lookup(EXAMPLES[0]["input_ids"])
    with pytest.raises(CommandError, match=r"shard-00002\.safetensors is missing"):
        cache.lookup(EXAMPLES[-1]["input_ids"])


def test_a_whole_file_of_another_cache_or_place_is_damage(llama: Any, folder: Path, tmp_path: Path) -> None:
    write_cache(llama, EXAMPLES, tmp_path / "other", **{**OPTIONS, "temperature": 2.0})
    second = folder / shard_name(1)
    for source in (tmp_path / "other" / second.name, folder / shard_name(0)):
        shutil.copyfile(source, second)
        with pytest.raises(CommandError, match=r"shard-00001\.safetensors is damaged \(it is another file"):
            look_everywhere(folder)
        with pytest.raises(CommandError, match=r"shard-00001\.safetensors is damaged \(it belongs to another cache"):
            write_cache(llama, EXAMPLES, folder, **OPTIONS)
    shutil.copyfile(tmp_path / "other" / "index.safetensors", folder / "index.safetensors")
    with pytest.raises(CommandError, match=r"index\.safetensors is damaged \(it is another file"):
        TopKCache(folder)


def test_a_changed_manifest_is_refused_whatever_was_changed(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest:
        (folder / "manifest.json").write_text(json.dumps({**manifest, name: 3}))
        with pytest.raises(CommandError, match=r"manifest\.json is damaged"):
            TopKCache(folder)
    for text in ("", "[]", "3", "{}", "\x00"):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CommandError, match=r"manifest\.json is damaged"):
            TopKCache(folder)
