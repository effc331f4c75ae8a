"""What reads strangers' files, fed with damaged ones: `python fuzz/fuzzing.py header --inputs 1000000`.

Valid inputs are mutated: by our own mutator, which knows where the format's numbers and quotes are, or with
`--atheris` by libFuzzer, which watches what the code does. An input may be accepted or refused by a MergeToolError;
anything else, an acceptance that the safetensors library does not share, or a refusal that DIFFERENCES does not
explain, ends the run and leaves the input in `fuzz/crashes/`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

from merge_tool.checkpoint import header as header_module
from merge_tool.checkpoint.folder import Folder
from merge_tool.checkpoint.fp8 import find_scaled, without_quantization
from merge_tool.checkpoint.header import DTYPE_BITS, TensorInfo, build_header
from merge_tool.checkpoint.quantised import why_quantised
from merge_tool.checkpoint.reader import FileTensor, _load_weight_map
from merge_tool.checkpoint.source import LocalFile
from merge_tool.errors import HeaderError, MergeToolError
from merge_tool.models.cards import front_matter, inherited
from merge_tool.models.lora_config import read_settings
from merge_tool.models.side_files import (
    _module_folders,
    edit_config_dtype,
    edit_vocab_size,
    without_quantization_config,
)
from merge_tool.output.journal import Journal
from merge_tool.output.older import read_sums
from merge_tool.output.report import read_identity, stream_report
from merge_tool.plan.parents import _settings
from merge_tool.run.findings import from_record
from merge_tool.vocabulary.join import _joined
from merge_tool.vocabulary.tokenizer_json import TokenizerJson

# What the library accepts and we refuse, by our message; argued in docs/reliability.md.
DIFFERENCES = {
    "a name twice": r"the name '.*' appears twice",
    "a key twice": r"a key appears twice|has the key '.*' twice",
    "an unknown key in an entry": r"must have dtype, shape and data_offsets, and nothing else",
    "a size of 2^63 or more beside a size of 0": r"does not take \d|is not a non-negative integer",
    "space before the first brace": r"does not start with '\{'",
    "an entry of more than 65,536 characters": r"its entry is not valid JSON",
}


class Wrong(Exception):
    """An input was handled wrongly."""


# -------------------------------------------------------------------------------------------- header


def library(file: bytes) -> list[tuple[str, str, tuple[int, ...]]] | None:
    """What the safetensors library finds, or None if it refuses."""
    try:
        return sorted((name, str(t["dtype"]), tuple(t["shape"])) for name, t in deserialize(file))
    except SafetensorError:
        return None


def check_header(raw: bytes) -> str:
    """`raw`: the last two bytes say how many bytes of data follow the rest, which is the header."""
    raw, size = raw[:-2], int.from_bytes(raw[-2:], "little") % 5000
    file = len(raw).to_bytes(8, "little") + raw + bytes(size)
    theirs = library(file)
    try:
        tensors, _ = header_module.parse_header(raw, file_size=len(file), where="x")
    except HeaderError as e:
        if "\x1b" in str(e):
            raise Wrong("a terminal code is printed") from e
        if theirs is None:
            return "both refuse"
        return f"only the library: {explained(str(e))}"
    if theirs is None:
        raise Wrong("accepted, and the library refuses it")
    if sorted((t.name, t.dtype, t.shape) for t in tensors) != theirs:
        raise Wrong("accepted with other tensors than the library's")
    if any(t.offset + t.nbytes > len(file) for t in tensors):
        raise Wrong("a tensor ends behind the file")
    return "both accept"


def explained(message: str) -> str:
    for what, pattern in DIFFERENCES.items():
        if re.search(pattern, message, re.DOTALL):
            return what
    raise Wrong(f"refused, and the library accepts it: {message}")


def valid_header(chance: random.Random) -> bytes:
    infos = []
    for number in range(chance.choice([0, 1, 1, 2, 3, 5])):
        dtype = chance.choice(list(DTYPE_BITS))
        shape = tuple(chance.choice([0, 1, 2, 3, 8]) for _ in range(chance.choice([0, 1, 2, 3])))
        if DTYPE_BITS[dtype] % 8:
            shape = (*shape, 4)
        infos.append(
            TensorInfo(chance.choice(["a", "model.norm.weight", "ü", "x\n", "", "\0"]) + str(number), dtype, shape, 0)
        )
    metadata = chance.choice([{}, {"format": "pt"}, {"a": "b", "c": "\u2028"}])
    header, placed = build_header(infos, metadata)
    text = bytes(header[8:])
    if chance.random() < 0.3:
        text = json.dumps(json.loads(text), indent=chance.choice([None, 1])).encode()
    return text + sum(t.nbytes for t in placed).to_bytes(2, "little")


SIGNS = [
    b"0", b"1", b"9", b"-", b"[", b"]", b"{", b"}", b",", b":", b'"', b" ", b"e", b".", b"\\", b"\x00", b"\xff", b"\n",
    b"null", b"true", b"18446744073709551616", b"9223372036854775808", b"\\ud800", b"\\u0000", b"\x1b[2J",
    b"\xef\xbb\xbf", b'"a0":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},', b'"dtype":"U8",', b'"__metadata__":{},',
    b"NaN", b"1e3",
]  # fmt: skip


def mutated(raw: bytes, chance: random.Random) -> bytes:
    """At most three small changes: signs put in or over others, numbers changed, pieces doubled, cut or swapped."""
    for _ in range(chance.choice([0, 0, 1, 1, 1, 2, 3])):
        place, kind = chance.randrange(len(raw) + 1), chance.randrange(9)
        length = chance.choice([0, 1, 2, 8])
        if kind < 2:
            raw = raw[:place] + chance.choice(SIGNS) + raw[place + length :]
        elif kind == 2 and (numbers := list(re.finditer(rb"\d+", raw))):
            number = chance.choice(numbers)
            value = int(number[0]) + chance.choice([-1, 1, 8, 1 << 32, 1 << 63]) if len(number[0]) < 40 else 0
            raw = raw[: number.start()] + str(value).encode() + raw[number.end() :]
        elif kind == 3:
            raw = raw[:place] + raw[place : place + 30] + raw[place:]
        elif kind == 4:
            raw = raw[:place] + raw[place + length :]
        elif kind == 5 and (members := list(re.finditer(rb'"[^"]*":\{[^}]*\},?', raw))):
            member = chance.choice(members)
            raw = raw[: member.start()] + member[0].rstrip(b",") + b"," + raw[member.start() :]
        else:  # what a valid header may have as well
            spaces = [m.end() for m in re.finditer(rb"[\[\]{},:]", raw[:-2])]
            place = chance.choice(spaces) if spaces else len(raw)
            raw = raw[:place] + chance.choice([b" ", b"\n", b"\t", b"  "]) + raw[place:] if place > 1 else raw
    return raw


# ------------------------------------------------------------------------------------- other readers


def in_folder(name: str, read: Callable[[Folder], object]) -> Callable[[bytes], str]:
    """A target that puts the input into a folder as `name` and lets `read` read it."""
    place = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    folder = Folder(place)

    def check(raw: bytes) -> str:
        (place / name).write_bytes(raw)
        try:
            read(folder)
        except MergeToolError as e:
            if "\x1b" in str(e):
                raise Wrong("a terminal code is printed") from e
            return "refused"
        return "accepted"

    return check


def read_config(folder: Folder) -> None:
    config = folder.load_json("config.json")
    file = LocalFile(folder.root / "config.json", "config.json")
    codes = FileTensor(TensorInfo("a", "F8_E4M3", (40, 40), 0), file)
    scales = FileTensor(TensorInfo("a_scale", "F32", (3, 3), 0), file)
    found = find_scaled(folder.name, config, {"a": codes, "a_scale": scales})
    why_quantised(config if found is None else without_quantization(config), {"a": codes.info})
    for value in _settings(config).values():
        str(value)
    raw = (folder.root / "config.json").read_bytes()
    edit_config_dtype(raw, "BF16")
    edit_vocab_size(raw, frozenset({8}), 9)
    json.loads(without_quantization_config(raw))


def read_report(folder: Folder) -> None:
    read_identity(folder.root / "merge_report.json")
    with (folder.root / "merge_report.json").open(encoding="utf-8", newline="") as lines:
        try:
            for place, (_, tensor) in enumerate(stream_report(lines)):
                if place:
                    from_record({**tensor, "kept_base": False})
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
            raise MergeToolError("refused") from e  # as verify does


def read_card(folder: Folder) -> None:
    str(front_matter(folder.root / "README.md"))[:100]
    inherited(folder.root / "README.md")


def read_adapter(folder: Folder) -> None:
    (folder.root / "adapter_model.safetensors").touch()
    settings = read_settings(folder)
    for module in ("layers.1.q", "layers.11.q", "v"):
        settings.scale_of(module)


def read_tokenizer(folder: Folder) -> None:
    path = folder.root / "tokenizer.json"
    one, other = TokenizerJson(path, "t"), TokenizerJson(path, "t")
    other.ids["only here"] = other.size
    other.size += 1
    answer, rest = _joined([one, other], {"lead": 0, "union": True, "named": [], "wanted": []})
    insert_at, raw = one.insert_at, path.read_bytes()
    end = rest[4 * 2 * answer["size"] :]
    if json.loads(raw[:insert_at] + end + raw[insert_at:])["added_tokens"][-1]["content"] != "only here":
        raise Wrong("a token is put in somewhere else")


ADAPTER = json.dumps(
    {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"q": 4}, "alpha_pattern": {r"^.*\.1\.q$": 2.5}}
).encode()
TOKENIZER = json.dumps(
    {
        "added_tokens": [{"id": 2, "content": "<s>", "special": True}],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}},
    }
).encode()
CONFIG = json.dumps(
    {
        "architectures": ["A"],
        "dtype": "bfloat16",
        "text_config": {"torch_dtype": "float32", "rope_theta": 1e4, "quantization_config": {"quant_method": "x"}},
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"block_structure": [16, 16]}}},
        },
        "x": [1, None],
    }
).encode()
INDEX = b'{"metadata": {"total_size": 8}, "weight_map": {"a": "m-1.safetensors", "b": "sub/m-2.safetensors"}}'
REPORT = b"""{
 "format": 2,
 "plan_sha256": "%s",
 "samples_sha256": [
  "%s",
  "%s"
 ],
 "tensors": [
  {"name": "a", "equal": false, "sums": {"xx": "0x1.8p+1", "xd": "0x0.0p+0", "dd": "0x1p-3", "scale": "0x1p0"}},
  {"name": "b", "equal": false, "passes": [[["0x1.8p+1", "0x0.0p+0"], [["0x1p-3"]]]]}
 ]
}
""" % ((b"0" * 64,) * 3)
CARD = (
    b"---\nlicense: mit\nlanguage:\n- en\n- no\nbase: &a [1, 2]\ntags: *a\n<<: {license: apache}\nd: 2001-01-01\n"
    b"---\n# x\n"
)
SUMS = b"%s  config.json\n\\%s  a\\nb\n" % ((b"0" * 64,) * 2)
MODULES = b'[{"idx": 0, "path": "1_Dense", "type": "x"}, {"path": ""}]'
MODEL_INDEX = b'{"_class_name": "X", "unet": ["diffusers", "UNet"], "vae": [null, null]}'


def valid_journal(chance: random.Random) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "j")
        journal.append([{"record": "plan", "facts": {}}, {"record": "shard", "number": 0, "sha256": ["00"]}])
        return journal.path.read_bytes()


TARGETS: dict[str, tuple[Callable[[random.Random], bytes], Callable[[], Callable[[bytes], str]]]] = {
    "header": (valid_header, lambda: check_header),
    "index": (lambda c: INDEX, lambda: in_folder("i.index.json", lambda f: _load_weight_map(f, "i.index.json"))),
    "config": (lambda c: CONFIG, lambda: in_folder("config.json", read_config)),
    "adapter": (lambda c: ADAPTER, lambda: in_folder("adapter_config.json", read_adapter)),
    "tokenizer": (lambda c: TOKENIZER, lambda: in_folder("tokenizer.json", read_tokenizer)),
    "report": (lambda c: REPORT, lambda: in_folder("merge_report.json", read_report)),
    "card": (lambda c: CARD, lambda: in_folder("README.md", read_card)),
    "sums": (lambda c: SUMS, lambda: in_folder("SHA256SUMS", lambda f: read_sums(f.root))),
    "modules": (lambda c: MODULES, lambda: in_folder("modules.json", _module_folders)),
    "model_index": (lambda c: MODEL_INDEX, lambda: in_folder("model_index.json", _module_folders)),
    "journal": (valid_journal, lambda: in_folder("j", lambda f: list(Journal(f.root / "j").records()))),
}


# ------------------------------------------------------------------------------------------- running


def keep(target: str, raw: bytes) -> Path:
    folder = Path(__file__).parent / "crashes"
    folder.mkdir(exist_ok=True)
    path = folder / f"{target}-{hashlib.sha256(raw).hexdigest()[:16]}"
    path.write_bytes(raw)
    return path


def fuzz(target: str, inputs: int, seed: int, seconds: float) -> dict[str, Any]:
    """Feed so many mutated inputs, or for so long; returns what became of them, and the slowest in seconds."""
    valid, make = TARGETS[target]
    check, chance, found, slowest = make(), random.Random(seed), Counter[str](), 0.0
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for number in range(inputs):
        raw = mutated(valid(chance), chance)
        begun = time.monotonic()
        try:
            found[check(raw)] += 1
        except Exception as e:
            raise SystemExit(f"{target}: {type(e).__name__}: {e}: {keep(target, raw)}") from e
        slowest = max(slowest, time.monotonic() - begun)
        if number % 1000 == 0 and time.monotonic() - started > seconds:
            break
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return {"target": target, "inputs": sum(found.values()), "slowest_s": round(slowest, 3), "grown_mb": grown, **found}


def fuzz_with_atheris(target: str, inputs: int, seconds: float) -> None:
    """Coverage-guided, by libFuzzer; ends the process."""
    import atheris

    for name in ("parse_header", "_parse_members", "_check_entry", "_check_layout", "_decode_entry"):
        setattr(header_module, name, atheris.instrument_func(getattr(header_module, name)))
    valid, make = TARGETS[target]
    check, chance = make(), random.Random(0)
    with tempfile.TemporaryDirectory() as corpus:
        for number in range(50):
            (Path(corpus) / str(number)).write_bytes(mutated(valid(chance), chance))
        words = [
            sys.argv[0],
            f"-runs={inputs}",
            f"-max_total_time={int(seconds)}",
            "-max_len=4096",
            "-timeout=10",
            corpus,
        ]
        atheris.Setup(words, lambda raw: check(raw) if len(raw) > 2 else None)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    parser.add_argument("--inputs", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true")
    options = parser.parse_args()
    for target in options.target:
        if options.atheris:
            fuzz_with_atheris(target, options.inputs, options.seconds)
        print(json.dumps(fuzz(target, options.inputs, options.seed, options.seconds)), flush=True)


if __name__ == "__main__":
    main()
