"""A merge with the core install alone. Run by `make test-core` in an environment without torch or pytest."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def main() -> None:
    for name in ("torch", "transformers", "pytest"):
        assert importlib.util.find_spec(name) is None, f"{name} is installed: this is not the core install alone"
    bin_folder = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        subprocess.run([sys.executable, EXAMPLES / "make_tiny_pair.py", place], check=True)
        for command in (
            [bin_folder / "slerp-merge", "--help"],
            [bin_folder / "slerp-merge", place / "base", place / "ft", place / "out", "--t", "0.4"],
            [bin_folder / "merge-tool", "inspect", place / "out"],
            [sys.executable, EXAMPLES / "merge_in_python.py", place / "base", place / "ft", place / "python"],
        ):
            print("$", *(str(word).removeprefix(f"{folder}/").removeprefix(f"{bin_folder}/") for word in command))
            subprocess.run(command, check=True)
        assert (place / "out/model.safetensors").read_bytes() == (place / "python/model.safetensors").read_bytes()
        config = place / "c.yaml"
        config.write_text("model: m\nsources: [{path: d.jsonl}]\noutput: o\n")
        done = subprocess.run([bin_folder / "mixce-train", config], capture_output=True, text=True, check=False)
        assert done.returncode == 1, done
        assert done.stderr.startswith("Error: Training needs torch"), done.stderr
    print("core install: 4 commands passed, torch not needed")


if __name__ == "__main__":
    main()
