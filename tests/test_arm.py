"""The same bytes on an ARM processor, played by qemu. Needs `ARM_ROOT`, a folder with an ARM Python and its numpy:

    usr/bin/python3.11 and its libraries, as Debian's packages for arm64 unpack
    site/              the aarch64 wheels of numpy, ml_dtypes, safetensors and PyYAML, unpacked

and qemu-aarch64-static (Debian: qemu-user-static). Everything else is taken from this environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from checkpoints import contents, language_model, save_model
from merge_tool import merge, merge_models
from test_models import EACH, recipe

ROOT = Path(__file__).parents[1]
ARM = os.environ.get("ARM_ROOT")
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
pytestmark = pytest.mark.skipif(not (ARM and QEMU), reason="needs ARM_ROOT and qemu-aarch64")

MERGES = """
import json, platform, sys
from pathlib import Path
from merge_tool import merge, merge_models
assert platform.machine() == "aarch64", platform.machine()
base, ft, out, recipes = json.loads(sys.argv[1])
merge(base, ft, Path(out) / "pair", [0.3, 1.2], extrapolate=True, jobs=2, max_shard_bytes=20_000)
merge(base, ft, Path(out) / "float32", 0.4, dtype="float32")
for name, recipe in recipes.items():
    merge_models(recipe, Path(out) / name)
"""


def test_an_arm_processor_gives_the_same_bytes(tmp_path: Path) -> None:
    """Of a pair and of every method. What the methods compute beyond + - * / and roots is numpy's, which may differ by
    version and processor."""
    names = ("base", "ft", "ft2")
    models = [save_model(tmp_path / name, language_model(seed)) for seed, name in enumerate(names)]
    recipes = json.loads(json.dumps({method: recipe(method, models) for method in EACH}))
    question = json.dumps([str(models[0]), str(models[1]), str(tmp_path / "arm"), recipes])
    path = os.pathsep.join([f"{ARM}/site", str(ROOT), sysconfig.get_paths()["purelib"]])
    command = [str(QEMU), "-L", str(ARM), f"{ARM}/usr/bin/python3.11", "-c", MERGES, question]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    merge(models[0], models[1], tmp_path / "x86/pair", [0.3, 1.2], extrapolate=True, max_shard_bytes=20_000)
    merge(models[0], models[1], tmp_path / "x86/float32", 0.4, dtype="float32")
    for name, asked in recipes.items():
        merge_models(asked, tmp_path / "x86" / name)
    found, expected = contents(tmp_path / "arm"), contents(tmp_path / "x86")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
