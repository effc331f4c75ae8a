"""A real S3 server on 127.0.0.1: moto's, which other people wrote for other clients. `make test-slow` installs it
(moto[s3], flask, flask-cors); it starts with `python -m moto.server -H 127.0.0.1 -p PORT`, and keeps objects in memory.
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints import contents, language_model, save_model
from merge_tool import FetchError, OutputError, merge
from test_to_store import CONFIG, SIDE, SMALL

pytestmark = pytest.mark.slow
obstore: Any = pytest.importorskip("obstore", reason="pip install -e '.[cloud]'")
pytest.importorskip("moto", reason="pip install 'moto[s3]' flask flask-cors")
pytest.importorskip("flask_cors", reason="pip install flask flask-cors")

BASE, FT, OUT = "s3://models/a b/base", "s3://models/a b/ft", "s3://models/merged"


def _ask(url: str, method: str = "GET") -> None:
    urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=30).close()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The bucket `models` as obstore has it, with base and ft; the same two in tmp_path/here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    for key, value in {"ENDPOINT_URL": url, "ALLOW_HTTP": "true", "ACCESS_KEY_ID": "key", "REGION": "us-east-1",
                       "SECRET_ACCESS_KEY": "secret"}.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{key}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                _ask(f"{url}/models", "PUT")
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.2)
        bucket = importlib.import_module("obstore.store").from_url("s3://models")
        for seed, (name, shards) in enumerate({"base": 2, "ft": 1}.items()):
            tensors = language_model(seed, hidden=64, layers=8)
            folder = save_model(tmp_path / "here" / name, tensors, shards=shards, side_files=SIDE, config=CONFIG)
            for path in sorted(folder.iterdir()):
                obstore.put(bucket, f"a b/{name}/{path.name}", path)
        yield bucket
    finally:
        server.kill()
        server.wait()


def there(store: Any) -> dict[str, bytes]:
    names = [one["path"] for several in obstore.list(store, "merged") for one in several]
    return {name.removeprefix("merged/"): bytes(obstore.get(store, name).bytes()) for name in names}


def test_a_merge_from_a_bucket_into_a_bucket_is_the_local_one(store: Any, tmp_path: Path) -> None:
    """The second time it is complete. An object that is stored again while the merge runs has the same ETag as long as
    its bytes are the same; others stop it."""
    merge("here/base", "here/ft", "local", 0.4, **SMALL)
    report = merge(BASE, FT, OUT, 0.4, **SMALL)
    assert there(store) == contents(Path("local"))
    assert report.num_shards >= 4
    assert merge(BASE, FT, OUT, 0.4, **SMALL).already_complete
    with pytest.raises(OutputError, match=r"holds another merge: t was 0\.4, now 0\.5"):
        merge(BASE, FT, OUT, 0.5, **SMALL)
    with pytest.raises(FetchError, match="there is no bucket nobody"):
        merge("s3://nobody/base", FT, "x", 0.4)
    with pytest.raises(FetchError, match="nothing is there"):
        merge("s3://models/base", FT, "x", 0.4)


def test_parts_of_a_large_object(store: Any) -> None:
    """A multipart upload, whose ETag is no digest of the bytes; read again by range."""
    import numpy as np

    for seed in range(2):
        values = np.random.default_rng(seed).standard_normal((2500, 2000), np.float32)
        folder = save_model(Path(f"wide/m{seed}"), {"w": values})
        for path in folder.iterdir():
            obstore.put(store, f"wide/m{seed}/{path.name}", path)
    models = ("s3://models/wide/m0", "s3://models/wide/m1")
    merge(*models, OUT, 0.4)
    merge("wide/m0", "wide/m1", "local", 0.4)
    assert there(store) == contents(Path("local"))
    assert "-" in obstore.head(store, "merged/model.safetensors")["e_tag"]
    merge(OUT, models[0], "again", 0.4)
    merge("local", "wide/m0", "by-hand", 0.4)
    assert contents(Path("again"))["model.safetensors"] == contents(Path("by-hand"))["model.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_it_continues_also_from_an_empty_disk(store: Any, tmp_path: Path) -> None:
    """No model is there before the end, and the bytes are the same."""
    merge("here/base", "here/ft", "local", 0.4, **SMALL)
    whole, kills = contents(Path("local")), 0
    words = [sys.executable, str(Path(__file__).with_name("small_shards.py")), "merge", BASE, FT, OUT]
    words += ["--t", "0.4", "--max-shard-size", "120000", "--quiet"]
    for moment in range(60):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(1.5 + 0.1 * moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            time.sleep(0.3)  # its last request
            kills += 1
            found = there(store)
            is_model = {"config.json", "model.safetensors.index.json"} <= found.keys()
            assert not is_model or {name: found[name] for name in whole} == whole
            if kills % 2:
                shutil.rmtree("home", ignore_errors=True)
            continue
        assert process.returncode == 0
        break
    assert kills >= 2
    assert there(store) == whole
