"""OUT under another name of an input, by a link, a mount, or a disk that ignores case: refused, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints import contents, language_model, save_file
from merge_tool import MergeToolError, OutputError, merge, merge_models
from merge_tool.plan import overlap
from merge_tool.sweep import sweep
from test_lora import save_adapter

REFUSED = "the output is, or lies inside or around, the input"


@pytest.fixture
def mount() -> Iterator[Callable[[Path, Path], Path]]:
    """Shows a folder at a second place, as `mount --bind` does."""
    mounted: list[Path] = []

    def bind(folder: Path, place: Path) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        made = shutil.which("mount") and subprocess.run(["mount", "--bind", folder, place], capture_output=True)
        if not made or made.returncode:
            pytest.skip("this user may not mount a folder")
        mounted.append(place)
        return place

    yield bind
    for place in reversed(mounted):
        subprocess.run(["umount", place], check=True)


@pytest.fixture
def ignored_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that ignores case, as far as os.stat shows it: below tmp_path all names are in small letters, and any
    spelling finds them."""
    real = os.stat

    def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if isinstance(path, str | Path) and str(path).startswith(str(tmp_path)):
            path = f"{tmp_path}{str(path).removeprefix(str(tmp_path)).lower()}"
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)


@pytest.fixture
def two_inodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that numbers every name of a folder anew."""
    monkeypatch.setattr(overlap, "identity", lambda path: (1, hash(path)) if path.exists() else None)


def refusal(base: Path, ft: Path, out: Path, **options: Any) -> str:
    """The message, with --overwrite and without, which then does not speak of it."""
    with pytest.raises(OutputError) as caught:
        merge(base, ft, out, **options)
    assert "overwrite" not in str(caught.value)
    with pytest.raises(OutputError) as forced:
        merge(base, ft, out, overwrite=True, **options)
    return str(forced.value)


# ------------------------------------------------------------------------------------------- mounts and links


@pytest.mark.parametrize("side", [0, 1])
def test_a_mount_of_an_input_is_the_input(
    tmp_path: Path, pair: tuple[Path, Path], mount: Callable[[Path, Path], Path], side: int
) -> None:
    """So is what lies in it, and the same folder below a mount of a folder above it."""
    before = {path: contents(path) for path in pair}
    place = mount(pair[side], tmp_path / "elsewhere/m")
    above = mount(tmp_path, tmp_path / "above")
    for out in (place, place / "out", place / "x.safetensors", above / pair[side].name, above):
        assert REFUSED in refusal(*pair, out)
    assert REFUSED in refusal(*pair, place, t=[0.3, 0.6])
    assert {path: contents(path) for path in pair} == before


@pytest.mark.parametrize("layer", ["lower", "upper"])
def test_a_layer_of_an_overlay_is_the_input_that_shows_it(tmp_path: Path, layer: str) -> None:
    """Another device, other inodes; and the overlay remembers the names that it did not find."""
    for name in ("lower", "upper", "work", "shown"):
        (tmp_path / name).mkdir()
    under = tmp_path / layer / "m"
    for path in (under / "model.safetensors", tmp_path / "ft.safetensors"):
        path.parent.mkdir(exist_ok=True)
        save_file(language_model(len(path.name)), path)
    options = f"lowerdir={tmp_path / 'lower'},upperdir={tmp_path / 'upper'},workdir={tmp_path / 'work'}"
    made = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", options, tmp_path / "shown"], capture_output=True
    )
    if not made or made.returncode:
        pytest.skip("this user may not mount an overlay")
    try:
        shown, before = tmp_path / "shown/m", contents(under)
        for name in (".slerp-merge", ".slerp-merge/lock", ".slerp-merge-mark", "model.safetensors.partial"):
            assert not (shown / name).exists()
        for base, out in (shown, under), (shown / "model.safetensors", under / "model.safetensors"):
            with pytest.raises(OutputError, match=REFUSED):
                merge(base, tmp_path / "ft.safetensors", out, overwrite=True)
        assert contents(under) == contents(shown) == before
    finally:
        subprocess.run(["umount", tmp_path / "shown"], check=True)


def test_a_mount_in_place_of_one_output_of_several_is_seen(
    tmp_path: Path, pair: tuple[Path, Path], mount: Callable[[Path, Path], Path]
) -> None:
    """Or in place of an older output, or of a folder inside one: their files would be removed."""
    merge(*pair, tmp_path / "done", t=[0.3, 0.6])
    out, base = tmp_path / "out", tmp_path / "done/t-0.3"
    before = contents(tmp_path)
    mount(base, out / "t-0.3")
    for t in ([0.3, 0.4], [0.4, 0.5]):
        with pytest.raises(OutputError, match=REFUSED):
            merge(base, pair[1], out, t, overwrite=True)
    mount(pair[0] / "sub", tmp_path / "second/sub")
    with pytest.raises(OutputError, match=REFUSED):
        merge(*pair, tmp_path / "second", overwrite=True)
    for path in (base, pair[0]):
        assert all(before[f"{path.relative_to(tmp_path)}/{k}"] == v for k, v in contents(path).items())


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_a_link_in_place_of_an_older_output_is_seen(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    merge(*pair, tmp_path / "done")
    before = contents(tmp_path / "done")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/t-0.5").symlink_to(tmp_path / "done")
    with pytest.raises(OutputError, match=REFUSED):
        merge(tmp_path / "done", pair[1], tmp_path / "out", [0.3, 0.4], overwrite=True)
    (tmp_path / "out/t-0.5").rename(tmp_path / "out/t-0.1")  # not what an output of several at t = 0.5 is called
    merge(tmp_path / "done", pair[1], tmp_path / "out", [0.3, 0.4], overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["t-0.1", "t-0.3", "t-0.4"]
    (tmp_path / "linked").symlink_to(pair[0])
    assert REFUSED in refusal(*pair, tmp_path / "linked")
    assert REFUSED in refusal(tmp_path / "linked", pair[1], pair[0] / "sub")
    assert contents(tmp_path / "done") == before


def test_every_input_counts(tmp_path: Path, pair: tuple[Path, Path], mount: Callable[[Path, Path], Path]) -> None:
    """Adapters, models of a recipe, single files, whoever gives the configuration."""
    base, ft = pair
    adapter = save_adapter(tmp_path / "adapter", language_model(0))
    single = tmp_path / "files/a.safetensors"
    single.parent.mkdir()
    save_file(language_model(1), single)
    before = contents(tmp_path)
    places = {p: mount(p, tmp_path / f"m/{p.name}") for p in (base, ft, adapter, single.parent)}
    for models, out in (
        ((base, adapter), places[adapter]),
        ((f"{base}+{adapter}", ft), places[adapter]),
        ((base, single), places[single.parent]),
        ((base, single), places[single.parent] / "a.safetensors"),
    ):
        for files_from in ("base", "ft"):
            with pytest.raises(OutputError, match=REFUSED):
                merge(*models, out, overwrite=True, files_from=files_from)
    recipe = {"models": [{"model": str(base)}, {"model": str(ft)}], "merge_method": "linear"}
    recipe["parameters"] = {"weight": 1}
    for path in (base, ft):
        with pytest.raises(OutputError, match=REFUSED):
            merge_models(recipe, places[path], overwrite=True)
    with pytest.raises(MergeToolError, match="lies inside an input"):
        merge(base, ft, tmp_path / "out", report_path=places[base] / "config.json")
    for path, place in places.items():
        assert contents(place) == contents(path)
        assert all(before[f"{path.relative_to(tmp_path)}/{k}"] == v for k, v in contents(path).items())


def test_a_sweep_removes_no_input(tmp_path: Path, pair: tuple[Path, Path], mount: Callable[[Path, Path], Path]) -> None:
    """The folder `models` in its own is emptied: inputs may not be there."""
    (tmp_path / "lab").mkdir()
    shutil.move(tmp_path / "base", tmp_path / "lab/models/base")
    shutil.copytree(tmp_path / "ft", tmp_path / "lab/models/ft")
    models = tmp_path / "lab/models"
    mount(pair[1], tmp_path / "other/models")
    before = contents(tmp_path)
    for folder in (tmp_path / "lab", tmp_path / "other"):
        with pytest.raises(OutputError, match=REFUSED):
            sweep(models / "base", pair[1] if folder.name == "other" else models / "ft", folder, [0.5], ["true"],
                  overwrite=True)  # fmt: skip
    assert contents(tmp_path) == before


# ------------------------------------------------------------------------------------------------- spellings


def test_another_spelling_on_a_disk_that_ignores_case_is_the_input(
    tmp_path: Path, pair: tuple[Path, Path], ignored_case: None
) -> None:
    before = contents(tmp_path)
    for out in (tmp_path / "Base", tmp_path / "FT/out", tmp_path / "BASE/model.safetensors"):
        assert REFUSED in refusal(*pair, out)
    save_file(language_model(1), tmp_path / "a.safetensors")
    assert REFUSED in refusal(pair[0], tmp_path / "a.safetensors", tmp_path / "A.safetensors")
    (tmp_path / "a.safetensors").unlink()
    assert contents(tmp_path) == before


def test_a_folder_with_two_inodes_is_known_by_the_lock_in_it(
    tmp_path: Path, pair: tuple[Path, Path], mount: Callable[[Path, Path], Path], two_inodes: None
) -> None:
    """And without --overwrite, where nothing is written, by its files."""
    before = {path: contents(path) for path in pair}
    place = mount(pair[0], tmp_path / "m")
    above = mount(tmp_path, tmp_path / "above")
    for out in (place, place / "new", above / "base"):
        if out != place / "new":
            with pytest.raises(OutputError, match="It may be an input under another name"):
                merge(*pair, out)
        with pytest.raises(OutputError, match=REFUSED):
            merge(*pair, out, overwrite=True)
    with pytest.raises(OutputError, match=REFUSED):
        merge(pair[0], pair[1], above, overwrite=True)
    assert {path: contents(path) for path in pair} == before


def test_a_file_with_two_inodes_is_known_by_the_lock_beside_it(
    tmp_path: Path, pair: tuple[Path, Path], mount: Callable[[Path, Path], Path], two_inodes: None
) -> None:
    (tmp_path / "files").mkdir()
    single = tmp_path / "files/a.safetensors"
    save_file(language_model(1), single)
    before = single.read_bytes()
    place = mount(single.parent, tmp_path / "m")
    with pytest.raises(OutputError, match="It may be an input under another name"):
        merge(pair[0], single, place / "a.safetensors")
    with pytest.raises(OutputError, match=REFUSED):
        merge(pair[0], single, place / "a.safetensors", overwrite=True)
    merge(pair[0], single, single.parent / "b.safetensors")
    assert sorted(contents(single.parent)) == ["a.safetensors", "b.safetensors"]
    assert single.read_bytes() == before


def test_what_only_looks_like_an_input_may_be_replaced(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A copy of the input, an output beside it whose name begins alike, and a work folder with a lock in an input."""
    shutil.copytree(pair[0], tmp_path / "base2")
    merge(*pair, tmp_path / "base2", overwrite=True)
    save_file(language_model(0), tmp_path / "a.safetensors")
    merge(tmp_path / "a.safetensors", pair[1], tmp_path / "a.safetensors2")
    (pair[0] / ".slerp-merge").mkdir()
    (pair[0] / ".slerp-merge/lock").write_bytes(b"0" * 32)
    merge(*pair, tmp_path / "third")
    assert json.loads((tmp_path / "third/merge_report.json").read_text())["tensors"]
