"""What a new user meets in the first hour, and what a merge hands over to others: the published recipe, the card's
licence and links, paths typed wrong, and names that tell models apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train.errors
from checkpoints import language_model, load_folder, save_file, save_model
from merge_tool import CheckpointError, RecipeError, errors, merge, merge_models
from merge_tool.cli import merge_tool
from merge_tool.methods.registry import METHODS
from merge_tool.plan.architectures import architectures
from merge_tool.plan.published import published
from merge_tool.recipe.mergekit import parse_recipe
from merge_tool.recipe.recipe import Recipe
from merge_tool.recipe.yaml_edit import OWN, with_own, without_own
from merge_tool.verification.verify import verify
from train import __main__ as train_main

MIXCE_TRAIN = Path(sys.executable).with_name("mixce-train")
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_type": "LORA"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with m/base, m/ft, m/other and the adapters m/lora and m/lora2 (of m/base)."""
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("base", "ft", "other")):
        save_model(Path("m") / name, language_model(k))
    for k, name in enumerate(("lora", "lora2")):
        save_adapter(Path("m") / name, k)
    return tmp_path


def save_adapter(folder: Path, seed: int) -> None:
    q = language_model(0)["model.layers.0.self_attn.q_proj.weight"]
    random = np.random.default_rng(seed)
    factors = {"lora_A": (2, q.shape[1]), "lora_B": (q.shape[0], 2)}
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    folder.mkdir(parents=True)
    tensors = {f"{start}.{k}.weight": random.standard_normal(s).astype(np.float32) for k, s in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(LORA))


def run(*words: Any) -> Result:
    return CliRunner().invoke(merge_tool, [str(word) for word in words])


def succeed(*words: Any) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.output


def error(*words: Any) -> str:
    result = run(*words)
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.stderr
    return result.stderr


# --------------------------------------------------------------------------------- the published recipe

WITH_ADAPTERS = """# m/base and its adapters: do not touch m/lora in this comment
merge_method: ties
base_model: m/base     # m/base
models:
  - model: m/base+m/lora
    parameters: {weight: 1, density: 0.5}
  - model: {model: {path: m/base}, lora: {path: "m/lora2"}}   # a mapping
    parameters: {weight: 0.5, density: 0.5}
  - model: 'm/ft'
    parameters: {weight: &w 0.3, density: 0.5}
tokenizer_source: null
"""


def test_a_recipe_with_adapters_is_published_with_names_and_else_byte_for_byte(place: Path) -> None:
    """In mergekit_config.yml, the card and the report: no path, no rewritten comment."""
    Path("r.yaml").write_text(WITH_ADAPTERS)
    succeed("run", "r.yaml", "out", "-q")
    expected = (
        WITH_ADAPTERS.replace("base_model: m/base  ", "base_model: base  ").replace("m/base+m/lora", "base+lora")
        .replace("{path: m/base}", "{path: base}").replace('"m/lora2"', '"lora2"').replace("'m/ft'", "'ft'")
    )  # fmt: skip
    assert Path("out/mergekit_config.yml").read_text() == expected
    assert json.loads(Path("out/merge_report.json").read_text())["recipe"] == expected
    assert expected.strip() in Path("out/README.md").read_text()
    assert "base_model:\n- base\n- lora\n- lora2\n- ft\n" in Path("out/README.md").read_text()


def test_a_published_recipe_runs_again_with_seed_and_options_inside(place: Path) -> None:
    """The same weights, in another current folder, with the models by their names; verify agrees."""
    text = WITH_ADAPTERS.replace("ties", "dare_ties")
    Path("r.yaml").write_text(text)
    options = ("--seed", 7, "--exclude", "lm_head", "--set", "lambda=0.25,0.5", "--files-from", "m/ft")
    succeed("run", "r.yaml", "out", *options, "--dtype", "float32", "-q")
    again = Path("out/lambda-0.25/mergekit_config.yml")
    own = yaml.safe_load(again.read_text())[OWN]
    assert own == {
        "exclude": ["lm_head"], "dtype": "float32", "files_from": "model-3", "seed": 7, "set": ["lambda=0.25"],
    }  # fmt: skip
    Path("elsewhere").mkdir()
    os.chdir("elsewhere")
    again = Path("..") / again
    succeed("run", again, "out2", "--models-dir", "../m", "-q")
    assert (Path("out2/model.safetensors")).read_bytes() == (again.parent / "model.safetensors").read_bytes()
    assert (Path("out2/mergekit_config.yml")).read_text() == again.read_text()
    checked = ("--recipe", again, "--models-dir", "../m", "--full")
    assert "verified" in succeed("verify", "out2", *checked)
    assert "verified" in succeed("verify", again.parent, *checked)
    other = succeed("run", again, "out3", "--models-dir", "../m", "--seed", 0, "--set", "lambda=1")
    assert "3 models" in other or "lambda" not in other
    assert yaml.safe_load(Path("out3/mergekit_config.yml").read_text())[OWN]["set"] == ["lambda=1"]
    assert "seed" not in yaml.safe_load(Path("out3/mergekit_config.yml").read_text())[OWN]
    assert "verified" in succeed("verify", "out3", *checked)


def test_extrapolation_is_published_too(place: Path) -> None:
    recipe = "merge_method: slerp\nbase_model: m/base\nmodels: [{model: m/base}, {model: m/ft}]\nparameters: {t: 1.2}\n"
    Path("r.yaml").write_text(recipe)
    succeed("run", "r.yaml", "out", "--extrapolate", "-q")
    succeed("run", "out/mergekit_config.yml", "out2", "--models-dir", "m", "-q")
    assert Path("out/model.safetensors").read_bytes() == Path("out2/model.safetensors").read_bytes()


def test_ids_of_the_hub_stay_ids(place: Path) -> None:
    """Also under --models-dir, unless the folder has the model or a folder of that organisation."""
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: org/x@v1+m/lora}, {model: m/ft}]\n"
    recipe = parse_recipe(text, "r", METHODS)
    assert published(recipe) == text.replace("m/lora", "lora").replace("m/ft", "ft")
    again = parse_recipe(published(recipe), "r", METHODS, models_dir="m")
    assert [str(ref) for ref in again.models] == ["org/x@v1+m/lora", "m/ft"]
    (place / "m/org").mkdir()
    again = parse_recipe(text.replace("m/", ""), "r", METHODS, models_dir=place / "m")
    assert again.models[0].path == f"{place}/m/org/x"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("merge_tool: {sed: 3}", "merge_tool has no key 'sed' (did you mean 'seed'?)"),
        ("merge_tool: {seed: many}", "merge_tool: seed is many, which is no value for it."),
        ("merge_tool: {only: a}", "merge_tool: only is no list of texts."),
        ("merge_tool: {set: lambda}", "merge_tool: set is no list of NAME=VALUE."),
        ("merge_tool: {chat_template: /etc/passwd}", "merge_tool: chat_template is /etc/passwd"),
        ("merge_tool: {dtype: int4}", "merge_tool: dtype is 'int4'"),
        ("merge_tool: 3", "merge_tool is '3', expected a mapping"),
    ],
)
def test_options_of_a_recipe_are_checked(lines: str, expected: str) -> None:
    text = f"merge_method: linear\nmodels: [{{model: A, parameters: {{weight: 1}}}}]\n{lines}\n"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", METHODS)
    assert expected in str(caught.value)
    assert "line 3" in str(caught.value)


def test_a_regular_expression_of_a_stranger_cannot_hang_a_merge(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_tool.plan.patterns._MATCH_SECONDS", 1)
    tensors = {"a" * 40: np.ones(3, np.float32)}
    save_model(Path("m/a"), tensors)
    Path("r.yaml").write_text(
        "merge_method: linear\nmodels: [{model: m/a, parameters: {weight: 1}}]\nmerge_tool: {exclude: ['re:(a+)+$x']}\n"
    )
    assert "take longer than 1 s" in error("run", "r.yaml", "out")


NAMES = st.sampled_from(
    ["base", "ft", "other", "base+x", "a@b", "no", "1e3", "it's", "ü b", "null", "c: d", "#e", "ft2"]
)
ADAPTERS = st.sampled_from(["", "lora", "lora2"])
STYLES = st.sampled_from(["plain", "'", '"', "mapping", "folded"])


def spelled(path: str, adapter: str, style: str) -> str:
    """One model in YAML, in one of the ways that a user may write it."""
    text = f"{path}+{adapter}" if adapter else path
    if style == "mapping":
        lora = f", lora: {{path: {json.dumps(adapter, ensure_ascii=False)}}}" if adapter else ""
        return f"{{model: {{path: {json.dumps(path, ensure_ascii=False)}}}{lora}}}"
    if style == "'":
        return "'" + text.replace("'", "''") + "'"
    if style == "folded":
        return f">-\n      {text}"
    is_plain = style == "plain" and not any(sign in text for sign in ": #',") and yaml.safe_load(text) == text
    return text if is_plain else json.dumps(text, ensure_ascii=False)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.lists(st.tuples(NAMES, ADAPTERS, STYLES), min_size=2, max_size=4, unique_by=lambda one: one[:2]),
    base=st.booleans(), anchor=st.booleans(), seed=st.integers(0, 9), lam=st.sampled_from([None, 1e-05, 0.5]),
    end=st.sampled_from(["", "\n", "\n# m/ft\n", "\n...\n"]), indent=st.sampled_from(["", "  "]),
)  # fmt: skip
def test_what_is_published_parses_to_the_same_recipe(
    tmp_path_factory: pytest.TempPathFactory, chosen: list[tuple[str, str, str]], base: bool, anchor: bool, seed: int,
    lam: float | None, end: str, indent: str,
) -> None:  # fmt: skip
    """The models by names for paths, whatever their names, the way of writing them, anchors and comments; the rest and
    the options are the same. Publishing it again changes nothing."""
    folder = tmp_path_factory.mktemp("place") / "m n"
    for name in {*(name for name, _, _ in chosen), "lora", "lora2"}:
        (folder / name).mkdir(parents=True)
    path = lambda name: f"{folder}/{name}"  # noqa: E731
    lines = ["# a comment: m/ft", "merge_method: task_arithmetic", "models:"]
    for k, (name, adapter, style) in enumerate(chosen):
        model = spelled(path(name), path(adapter) if adapter else "", style)
        mark = "&first " if anchor and k == 0 and style != "folded" else ""
        lines += [f"  - model: {mark}{model}", f"    parameters: {{weight: 0.{k + 1}}} # m/base {name}"]
    used = anchor and chosen[0][2] != "folded"
    lines.append("base_model: " + ("*first" if used else spelled(path(chosen[0][0]), "", '"')))
    text = textwrap.indent("\n".join(lines), indent) + end
    words = {} if lam is None else {"lambda": [lam]}
    options = {"seed": seed} if seed else {}
    first = parse_recipe(text, "r", METHODS, values=words)
    bare = published(first)
    assert str(folder) not in bare
    own = {**options, **({"set": [f"lambda={lam}"]} if lam is not None else {})}
    whole = with_own(bare, own)
    assert "".join(line for line in whole.splitlines(True) if not line.strip().startswith(OWN)) == bare
    again = parse_recipe(whole, "r", METHODS, models_dir=folder)
    assert meaning(again, folder) == meaning(first, folder)
    assert again.options.seed == seed
    assert published(again) == bare


def meaning(recipe: Recipe, folder: Path) -> Any:
    models = [(Path(ref.path), ref.lora and Path(ref.lora)) for ref in recipe.models]
    return models, recipe.base, recipe.method, recipe.parameters, recipe.outputs, recipe.tokenizer, weights(recipe)


def weights(recipe: Recipe) -> Any:
    return [
        [(source.model, [[c.values for c in s.choices] for s in source.parameters.values()]) for source in part.sources]
        for module in recipe.modules for part in module.slices
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "{merge_method: linear, models: [{model: A}]}",
        "merge_method: linear\nmodels: [{model: A}]\nchat_template: |+\n  {{ x }}\n\n",
        "merge_method: linear\nmodels: [{model: A}]\nchat_template: |\n  {{ x }}",
        "? merge_method\n: linear\n? models\n: [{model: A}]",
        "---\n# x\n  merge_method: linear\n  models: [{model: A}]\n...\n",
        "&top\nmerge_method: linear\nmodels: [{model: A}]\n",
        "merge_tool:\n  seed: 3\nmerge_method: linear\nmodels: [{model: A}]",
        "merge_method: linear\nmodels: [{model: A}]\nmerge_tool: {seed: 3}   # mine",
        "\ufeffmerge_method: linear\nmodels: [{model: A}]",
    ],
)
def test_options_go_into_every_form_of_yaml(text: str) -> None:
    own = {"seed": 5, "set": ["t=1e-05"], "only": ["re:a\\.b", "ü'\""]}
    result = with_own(text, own)
    assert yaml.safe_load(result) == {**yaml.safe_load(text), OWN: own}
    assert with_own(result, own) == result
    if OWN not in text:
        assert without_own(result) == text


# ------------------------------------------------------------------------------------ names and links


def test_two_folders_of_one_name_are_told_apart_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mixce-train and Trainer write them: messages, card, report and recipe; and nothing looks like a Hub id."""
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("x/a/final", "x/b/final")):
        save_model(Path(name), language_model(k))
    assert "t=0 is BASE (a/final), t=1 is FT (b/final)" in succeed(
        "merge", "x/a/final", "x/b/final", "out", "--dry-run"
    )
    succeed("merge", "x/a/final", "x/b/final", "out", "-q")
    card = Path("out/README.md").read_text()
    assert "**a/final** (t = 0) and **b/final** (t = 1)" in card
    assert "base_model:\n- a-final\n- b-final\n" in card
    report = json.loads(Path("out/merge_report.json").read_text())
    assert [report["inputs"][side]["name"] for side in ("base", "ft")] == ["a/final", "b/final"]
    Path("r.yaml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: x/a/final}, {model: x/b/final}]\n"
    )
    succeed("run", "r.yaml", "out2", "-q")
    published_text = Path("out2/mergekit_config.yml").read_text()
    assert "[{model: ./a/final}, {model: ./b/final}]" in published_text
    succeed("run", "out2/mergekit_config.yml", "out3", "--models-dir", "x", "-q")
    assert Path("out2/model.safetensors").read_bytes() == Path("out3/model.safetensors").read_bytes()
    assert "./a/final: no such file or folder." in error("run", "out2/mergekit_config.yml", "out4")
    save_model(Path("x/c/final"), {"new": np.ones(2, np.float32)})
    assert "a/final and c/final do not have the same tensors" in error("merge", "x/a/final", "x/c/final", "out5")


def test_two_files_and_deeper_folders_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("p/one/run/final", "q/one/run/final")):
        save_model(Path(name), language_model(k))
    names = ("p/one/run/final", "q/one/run/final")
    assert "BASE (p/one/run/final), t=1 is FT (q/one/run/final)" in succeed("merge", *names, "out", "--dry-run")
    files = [f"{name}/model.safetensors" for name in names]
    assert f"BASE ({files[0]}), t=1 is FT ({files[1]})" in succeed("merge", *files, "out", "--dry-run")
    assert "t=0 is BASE (final), t=1 is FT (final)" in succeed("merge", names[0], names[0], "out", "--dry-run")


def test_an_id_links_a_local_folder_on_the_card(place: Path) -> None:
    options = ("--id", "base=org/b", "--id", "ft=org/f", "-q")
    succeed("merge", "m/base", "m/ft", "out", *options)
    assert "base_model:\n- org/b\n- org/f\n" in Path("out/README.md").read_text()
    assert "verified" in succeed("verify", "out", "--against", "m/base", "m/ft")
    Path("r.yaml").write_text(WITH_ADAPTERS)
    succeed("run", "r.yaml", "out2", "--id", "lora=org/l", "--id", "model-1=org/b", "-q")
    assert "base_model:\n- org/b\n- org/l\n- lora2\n- ft\n" in Path("out2/README.md").read_text()
    assert "no model is called m/base. Known: base, ft" in error("merge", "m/base", "m/ft", "o", "--id", "m/base=o/b")
    assert "expected NAME=ORG/NAME" in error("merge", "m/base", "m/ft", "o", "--id", "org/b")


# ------------------------------------------------------------------------------------------ licences


def card(folder: str, *lines: str) -> None:
    Path(folder, "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n# x\n")


def front(out: str) -> dict[str, Any]:
    text = Path(out, "README.md").read_text()
    content = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(content, dict)
    return content


def test_licences_that_differ_are_named_and_none_is_claimed(place: Path) -> None:
    card("m/base", "license: llama3", "license_link: LICENSE", "language: en")
    card("m/ft", "license: cc-by-nc-4.0")
    result = run("merge", "m/base", "m/ft", "out", "-q")
    sentence = "The licences differ (base: llama3; ft: cc-by-nc-4.0)."
    assert sentence in result.stderr
    assert sentence in Path("out/README.md").read_text()
    found = front("out")
    assert (found["license"], found["license_name"]) == ("other", "llama3-and-cc-by-nc-4.0")
    assert "license_link" not in found
    assert found["language"] == "en"
    assert sentence in run("merge", "m/base", "m/ft", "out2", "--dry-run").stderr


def test_adapters_and_all_models_of_a_recipe_count(place: Path) -> None:
    for name in ("base", "ft", "lora"):
        card(f"m/{name}", "license: apache-2.0")
    card("m/lora2", "license: other", "license_name: mine")
    Path("r.yaml").write_text(WITH_ADAPTERS)
    result = run("run", "r.yaml", "out", "-q")
    assert "(base: apache-2.0; lora: apache-2.0; lora2: mine; ft: apache-2.0)" in result.stderr
    assert front("out")["license_name"] == "apache-2.0-and-mine"


def test_one_licence_is_inherited_and_silence_is_named(place: Path) -> None:
    card("m/ft", "license: cc-by-nc-4.0", "language: fr")
    assert succeed("merge", "m/base", "m/ft", "out", "-q") == ""
    assert front("out")["license"] == "cc-by-nc-4.0"
    assert "language" not in front("out")
    assert "base states no licence." in Path("out/README.md").read_text()
    card("m/base", "license: cc-by-nc-4.0", "license_link: LICENSE")
    assert succeed("merge", "m/base", "m/ft", "out", "-q", "--overwrite") == ""
    assert front("out")["license_link"] == "LICENSE"
    assert "icence" not in Path("out/README.md").read_text().split("---\n")[2]


def test_two_licences_of_their_own_are_two(place: Path) -> None:
    """`other` says nothing: what it links to does."""
    card("m/base", "license: other", "license_link: LICENSE")
    card("m/ft", "license: other", "license_link: https://ft.example/terms")
    assert "The licences differ (base: other LICENSE; ft: other https://ft.example/terms)." in succeed(
        "merge", "m/base", "m/ft", "out", "-q"
    )
    assert "license_link" not in Path("out/README.md").read_text().partition("\n---\n")[0]


def test_a_licences_file_of_one_model_alone_is_named(place: Path) -> None:
    """The output has BASE's LICENSE, which FT's terms are not in; an empty list states nothing."""
    card("m/base", "license: llama3")
    card("m/ft", "license: cc-by-nc-4.0")
    card("m/other", "license: []")
    for name in ("LICENSE", "NOTICE.txt"):
        Path("m/base", name).write_text("terms")
    told = "The output's LICENSE, NOTICE.txt are base's alone."
    assert told in succeed("merge", "m/base", "m/ft", "out", "-q")
    assert told in Path("out/README.md").read_text()
    assert succeed("merge", "m/base", "m/other", "out2", "-q") == ""
    assert "alone" not in Path("out2/README.md").read_text()
    assert "license: llama3" in Path("out2/README.md").read_text()


# -------------------------------------------------------------------------------- paths typed wrong


@pytest.mark.parametrize("typed", ["m/bse", "./m/bse", "m/bse/", "./m/bse/", "m//bse"])
def test_a_path_typed_wrong_never_goes_to_the_hub(place: Path, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    """Not by any command: its form, or its first folder, says that it is local. The nearest name is named."""
    monkeypatch.setattr("merge_tool.checkpoint.hub._ask", lambda *words: pytest.fail(f"asked the Hub: {words}"))
    Path("r.yaml").write_text(f"merge_method: linear\nmodels: [{{model: {typed}, parameters: {{weight: 1}}}}]\n")
    for words in (
        ("merge", typed, "m/ft", "out"),
        ("merge", "m/base", typed, "out"),
        ("merge", f"m/base+{typed}", "m/ft", "out"),
        ("run", "r.yaml", "out"),
        ("diff", typed, "m/ft"),
        ("inspect", typed),
        ("sweep", typed, "m/ft", "out", "--eval", "true"),
    ):
        text = error(*words)
        assert "no such file or folder" in text
        assert "Did you mean m/base?" in text
    with pytest.raises(CheckpointError, match="Did you mean m/base"):
        merge(typed, "m/ft", "out")
    with pytest.raises(CheckpointError, match="Did you mean m/base"):
        merge_models({"merge_method": "passthrough", "models": [{"model": typed}]}, "out")


def test_a_form_that_is_local_is_never_an_id_and_a_revision_says_that_the_hub_is_meant(place: Path) -> None:
    from merge_tool.checkpoint.hub import hub_id

    assert hub_id("n/bse") == ("n/bse", None)  # nothing here is called n
    assert [hub_id(text) for text in ("./n/bse", "n/bse/", "m/bse", "m/base@main", "/n/bse", "~/bse")] == [None] * 6
    assert hub_id("m/bse@main") == ("m/bse", "main")
    assert "Did you mean" not in error("inspect", "m/quite-another")
    assert "Check the spelling." in error("inspect", "m/quite-another")


@pytest.mark.parametrize("typed", ["mm/base", "mn/base", "./mm/base"])
def test_a_folder_typed_wrong_never_goes_to_the_hub(place: Path, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    """Where a folder of nearly that name has the model; the message says how to mean the Hub all the same."""
    monkeypatch.setattr("merge_tool.checkpoint.hub._ask", lambda *words: pytest.fail(f"asked the Hub: {words}"))
    Path("mm1").mkdir()  # nearer, but the model is not in it
    Path("r.yaml").write_text(f"merge_method: linear\nmodels: [{{model: {typed}, parameters: {{weight: 1}}}}]\n")
    for words in (("merge", typed, "m/ft", "out"), ("merge", "m/ft", typed, "out"), ("run", "r.yaml", "out")):
        text = error(*words)
        assert "Did you mean m/base?" in text
        assert (f"A model of the Hub is {typed}@main." in text) == (not typed.startswith("."))


def test_the_nearest_name_may_be_of_a_folder_above(place: Path) -> None:
    assert "Did you mean m/base/config.json?" not in error("inspect", "m/bse/none")
    save_file(load_folder(Path("m/base")), Path("m/base/x.safetensors"))
    assert "Did you mean m/base/x.safetensors?" in error("inspect", "m/bse/x.safetensors")


def test_verify_of_an_api_output_takes_the_models_dir(place: Path) -> None:
    merge_models({"merge_method": "linear", "models": [{"model": "m/ft", "parameters": {"weight": 1}}]}, "out")
    (done,) = verify("out", recipe="out/mergekit_config.yml", models_dir="m", full=True)
    assert not done.problems
    with pytest.raises(RecipeError, match='models_dir="nowhere": is not a folder'):
        merge_models("out/mergekit_config.yml", "out2", models_dir="nowhere")


# ----------------------------------------------------------------------------------- architectures


def configured(folder: str, seed: int, config: dict[str, Any], **more: Any) -> Path:
    return save_model(Path(folder), language_model(seed, **more), config=config)


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


@pytest.mark.parametrize("more", [{}, {"hidden": 48}])
def test_architectures_that_differ_are_the_first_line(place: Path, more: dict[str, Any]) -> None:
    """Whether or not the tensors fit; no advice leads to a merge of two architectures."""
    configured("m/llama", 0, LLAMA)
    configured("m/qwen", 1, QWEN, **more)
    expected = "The architectures differ: llama is llama (LlamaForCausalLM), qwen is qwen2 (Qwen2ForCausalLM)."
    models = "[{model: m/llama}, {model: m/qwen}]"
    Path("r.yaml").write_text(f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: {models}\n")
    for words in (("merge", "m/llama", "m/qwen", "out"), ("run", "r.yaml", "out")):
        text = error(*words)
        assert text.startswith(f"Error: {expected}")
        assert "--on-missing" not in text
        assert "--on-mismatch" not in text
        assert text.endswith("To merge them anyway: --allow-different-architectures.\n")
    allowed = run("merge", "m/llama", "m/qwen", "out", "--allow-different-architectures")
    assert allowed.exit_code == bool(more)
    assert ("architectures differs" if not more else "do not have the same tensors") in allowed.stderr


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (LLAMA, {"architectures": ["LLaMAForCausalLM"], "model_type": "llama"}),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}),
    (LLAMA, {"architectures": ["LlamaModel"]}),
    (LLAMA, {}),
    ({"architectures": ["StableLMEpochForCausalLM"], "model_type": "stablelm_epoch"}, {"model_type": "stablelm"}),
    ({"architectures": ["RWForCausalLM"], "model_type": "RefinedWebModel"}, {"architectures": ["FalconForCausalLM"]}),
    ({"model_type": "xlm-roberta"}, {"model_type": "xlm_roberta"}),
    ({"architectures": ["T5WithLMHeadModel"]}, {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}),
    ({"model_type": "gemma3_text"}, {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}),
    (LLAMA, {"model_type": "llava", "text_config": {"model_type": "llama"}}),
    (QWEN, {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"}),
    (QWEN, {"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text"}}),
]
OTHERS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (LLAMA, QWEN),
    (LLAMA, {"model_type": "mistral"}),
    ({"model_type": "gemma"}, {"model_type": "gemma2"}),
    (QWEN, {"model_type": "llava", "text_config": {"model_type": "llama"}}),
    ({"architectures": ["MixtralForCausalLM"]}, {"architectures": ["MistralForCausalLM"]}),
]


def test_old_names_and_language_models_inside_others_are_one_architecture() -> None:
    assert [pair for pair in SAME if not _are_one(*pair)] == []
    assert [pair for pair in OTHERS if _are_one(*pair)] == []


def _are_one(one: dict[str, Any], other: dict[str, Any]) -> bool:
    first, second = architectures(one), architectures(other)
    return not first or not second or bool(first & second)


def test_a_model_that_only_lends_its_tokenizer_may_be_another(place: Path) -> None:
    configured("m/llama", 0, LLAMA)
    configured("m/llama2", 1, LLAMA)
    configured("m/qwen", 1, QWEN)
    Path("r.yaml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: m/llama}, {model: m/llama2}]\n"
        "tokenizer_source: m/qwen\n"
    )
    assert "architectures differ" not in run("run", "r.yaml", "out").stderr


# ------------------------------------------------------------------------------------- installing


def test_every_install_line_is_the_readmes() -> None:
    """The package is on no registry: nothing says `pip install slerp-merge`."""
    root = Path(__file__).parents[1]
    readme = (root / "README.md").read_text()
    assert "pip install .\n" in readme
    for line in (errors.install("train,plot"), train.errors.install("train,plot")):
        assert line.split(" in ")[0] in readme
    kinds = ("*.py", "*.md", "*.sh", "*.yaml", "*.toml")
    folders = ("merge_tool", "train", "docs", "examples", "bench")
    files = [file for folder in folders for kind in kinds for file in (root / folder).rglob(kind)]
    assert [file for file in [*files, root / "README.md"] if "slerp-merge[" in file.read_text()] == []


def test_training_without_its_packages_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in an installation of the merger alone; --help works there."""
    monkeypatch.setattr("train.__main__.find_spec", lambda name: None)
    Path("c.yaml").write_text("model: m\nsources: [{path: d.jsonl}]\noutput: o\n")
    assert train_main.run(["c.yaml"]) == 1
    assert capsys.readouterr().err == (
        "Error: Training needs torch, transformers, datasets, filelock, not installed here. "
        "Install: pip install '.[train]' in slerp-merge's folder (a checkout).\n"
    )
    assert train_main.run(["--help"]) == 0


@pytest.mark.skipif(not MIXCE_TRAIN.exists(), reason="the command is not installed here")
@pytest.mark.parametrize("start", [[], ["torchrun", "--no-python", "--nproc-per-node", "1"]])
def test_a_train_py_of_the_users_is_not_run(place: Path, start: list[str]) -> None:
    """By the command as the docs give it, alone and under torchrun; `python -m train` would run it."""
    Path("train.py").write_text("raise SystemExit('the wrong program')\n")
    command = [str(MIXCE_TRAIN.with_name(word)) if word == "torchrun" else word for word in start]
    done = subprocess.run([*command, MIXCE_TRAIN, "--help"], capture_output=True, text=True)
    assert (done.returncode, "the wrong program" in done.stderr) == (0, False)
    assert "usage: mixce-train CONFIG.yaml" in done.stdout


# ---------------------------------------------------------------------------------- what is printed

STACK = """merge_method: passthrough
slices:
  - sources: [{model: m/base, layer_range: [0, 1]}]
  - sources: [{model: m/ft, layer_range: [1, 3]}]
"""


def test_a_stack_says_which_models_its_tensors_are_copied_from(place: Path) -> None:
    """It has no base, so nothing is said to be the base's."""
    Path("r.yaml").write_text(STACK)
    text = succeed("run", "r.yaml", "out")
    tensors = json.loads(Path("out/merge_report.json").read_text())["tensors"]
    sources = [tensor["sources"][0]["model"] for tensor in tensors]
    counts = [sources.count(f"model-{k}") for k in (1, 2)]
    expected = f"{sum(counts)} tensors are copied, not merged: {counts[0]} of base, {counts[1]} of ft."
    assert expected in text
    assert expected in Path("out/README.md").read_text()
    assert "the base's" not in text


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: m/ft}]", "linear of 1 model, "),
        (
            "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: m/ft}, {model: m/base}]",
            "linear of 2 models",
        ),
        (
            "merge_method: ties\nbase_model: m/base\nparameters: {weight: 1, density: 1}\nmodels: [{model: m/ft}]",
            "ties of 1 model and a base, ",
        ),
        (
            "merge_method: ties\nbase_model: m/base\nparameters: {weight: 1, density: 1}\n"
            "models: [{model: m/ft}, {model: m/other}, {model: m/base}]",
            "ties of 2 models and a base, ",
        ),
        (
            "merge_method: slerp\nbase_model: m/base\nparameters: {t: 0.5}\nmodels: [{model: m/base}, {model: m/ft}]",
            "slerp of 2 models, ",
        ),
    ],
)
def test_models_are_counted_in_words(place: Path, recipe: str, expected: str) -> None:
    Path("r.yaml").write_text(recipe)
    assert f"out: {expected}" in succeed("run", "r.yaml", "out")


def test_one_of_a_thing_is_not_many_and_values_are_no_reprs(place: Path) -> None:
    plan = succeed("merge", "m/base", "m/ft", "out", "--dry-run", "--jobs", 1)
    assert "1 job\n" in plan
    assert "1 other file\n" in plan
    succeed("merge", "m/base", "m/ft", "out", "--t", "0.4", "--exclude", "embed_tokens", "-q")
    assert "1 tensor is not merged: the base's is kept." in Path("out/README.md").read_text()
    assert "t was 0.4, now 0.5" in error("merge", "m/base", "m/ft", "out", "--exclude", "embed_tokens")
    one, two = ({"architectures": [name], "model_type": "m"} for name in ("A", "B"))
    configured("m/a", 0, one)
    configured("m/b", 1, two)
    warned = run("merge", "m/a", "m/b", "out2").stderr
    assert "architectures differs: A in a, B in b: are these related models?\n" in warned


@pytest.mark.parametrize("name", ["out.gguf", "out.bin", "out.pt", "out.ckpt", "deep/out.GGUF"])
def test_an_out_with_the_name_of_other_weights_is_refused(place: Path, name: str) -> None:
    for words in ((), ("--dry-run",)):
        text = error("merge", "m/base", "m/ft", name, *words)
        assert "only safetensors are written" in text
        assert f"Give {name.rpartition('.')[0]}, then convert that" in text
    assert not Path(name).exists()


def test_a_full_disk_is_told_in_units_without_the_reserve(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_tool.plan.prepare.Prepared.free_disk_bytes", 15_000_000)
    monkeypatch.setattr("merge_tool.plan.prepare.Prepared.disk_bytes", 1_234_567_890)
    text = error("merge", "m/base", "m/ft", "out")
    expected = "out: the output takes 1.23 GB, its report and journal up to 16 MB; the disk has 15 MB free. Free some"
    assert expected in text


# ----------------------------------------------------------------------- folders, files and the Hub's cache


def test_a_recipes_path_is_relative_to_the_current_folder_and_the_message_says_so(place: Path) -> None:
    """With the line and the folder; one that is beside the recipe is never looked up on the Hub."""
    Path("sub/n/base").mkdir(parents=True)
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels:\n  - model: m/ft\n  - model: %s\n"
    Path("sub/r.yaml").write_text(text % "m/bse")
    expected = f"r.yaml, line 5: m/bse: no such file or folder. Paths are relative to the current folder, {place}."
    assert f"{expected} Did you mean m/base?" in error("run", "sub/r.yaml", "out")
    Path("sub/r.yaml").write_text(text % "n/base")
    assert "It is in the recipe's folder: run the command there, or give --models-dir sub." in error(
        "run", "sub/r.yaml", "out"
    )
    Path("sub/r.yaml").write_text(text % "{model: {path: ./m/none}}")
    assert "r.yaml, line 5: ./m/none: no such file or folder." in error("run", "sub/r.yaml", "out")


def test_a_file_in_place_of_its_folder_says_which_folder_to_give(place: Path) -> None:
    for file in ("m/base/config.json", "m/lora/adapter_config.json"):
        assert f"is no file of weights. Give its folder: {Path(file).parent}." in error("merge", file, "m/ft", "out")
    text = error("merge", "m/base", "m/lora/adapter_model.safetensors", "out")
    assert "m/lora/adapter_model.safetensors: is the file of an adapter. Give its folder: m/lora." in text


def test_a_training_without_a_result_names_its_last_checkpoint_by_the_path_as_typed(place: Path) -> None:
    """mixce-train's; of Trainer's, and of a folder of models, the path works, too."""
    for folder in ("checkpoints/step-00000009", "checkpoints/step-00000010"):
        save_model(Path("m/run") / folder, language_model(1))
    save_model(Path("m/trainer/checkpoint-5"), language_model(1))
    assert "Its last checkpoint: m/run/checkpoints/step-00000010." in error("merge", "m/base", "m/run", "out")
    assert "the last: m/trainer/checkpoint-5." in error("merge", "m/base", "m/trainer", "out")
    succeed("merge", "m/base", "m/run/checkpoints/step-00000010", "out")
    text = error("merge", "m", "m/ft", "out2")
    assert "models in base, ft, other and adapters in lora, lora2. Give one of these: m/base." in text


def test_a_recipe_or_models_given_to_the_other_command_say_which(place: Path) -> None:
    Path("r.yaml").write_text("merge_method: linear\n")
    assert "r.yaml: is no model. A recipe is merged by merge-tool run" in error("merge", "r.yaml", "m/ft", "out")
    assert "Missing argument 'OUT'. A recipe is merged by merge-tool run r.yaml OUT." in error("merge", "r.yaml", "out")
    assert "m/base: is a folder, expected a recipe" in error("run", "m/base", "out")
    assert "Two models are merged by slerp-merge BASE FT OUT." in error("run", "m/base", "m/ft", "out")
    many = error("merge", "m/base", "m/ft", "m/other", "out")
    assert "More than two models are merged by a recipe: merge-tool run RECIPE.yaml OUT." in many


def test_a_folder_of_checkpoints_names_the_last(place: Path) -> None:
    for number in (500, 1000, 90):
        Path(f"m/run/checkpoint-{number}").mkdir(parents=True)
    assert "Its folder checkpoint-1000 is a training's last: give that." in error("merge", "m/base", "m/run", "out")


def test_a_models_folder_of_the_hubs_cache_is_its_snapshot(place: Path) -> None:
    """That of `main`, or the only one; of several without `main`, the choice is the user's."""
    cache = Path("hub/models--org--x")
    (cache / "blobs").mkdir(parents=True)
    (cache / "refs").mkdir()
    for k, commit in enumerate(("aaa", "bbb")):
        save_model(cache / "snapshots" / commit, language_model(k))
    assert "give one of its snapshots: aaa, bbb." in error("merge", "m/base", cache, "out")
    (cache / "refs/main").write_text("bbb")
    succeed("merge", "m/base", cache, "out", "--t", 1, "-q")
    assert "base_model:\n- base\n- org/x\n" in Path("out/README.md").read_text()
    merged, model = load_folder(Path("out")), load_folder(cache / "snapshots/bbb")
    assert all((merged[name] == model[name]).all() for name in model)


def test_a_folded_adapter_is_the_merge_at_1_read_once(place: Path) -> None:
    read = json.loads(succeed("fold", "m/base", "m/lora", "folded", "--json"))["input_bytes"]
    merged = json.loads(succeed("merge", "m/base", "m/lora", "merged", "--t", 1, "--json"))["input_bytes"]
    assert Path("folded/model.safetensors").read_bytes() == Path("merged/model.safetensors").read_bytes()
    assert read < 0.6 * merged
    assert "base_model:\n- base\n- lora\n" in Path("folded/README.md").read_text()
    again = ("--recipe", "folded/mergekit_config.yml", "--models-dir", "m", "--full")
    assert "verified" in succeed("verify", "folded", *again)
    assert "Did you mean m/lora?" in error("fold", "m/base", "m/lra", "out")


# ------------------------------------------------------------------------------------------ mixce-train


def test_a_folded_adapter_is_not_called_a_copy(place: Path) -> None:
    text = succeed("fold", "m/base", "m/lora", "out")
    assert "are not merged with another model's: " in text
    assert " of base+lora with its adapter folded in." in text
    assert "copied" not in text


def test_a_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mixce-train, version ")


def test_a_model_without_a_tokenizer_is_one_line(place: Path) -> None:
    from train.model import load_tokenizer

    with pytest.raises(train.errors.TrainError) as caught:
        load_tokenizer("m/base", None, None)
    assert str(caught.value) == (
        "m/base: has no tokenizer. Copy tokenizer.json and tokenizer_config.json of its base there."
    )


def test_more_epochs_on_a_finished_run_say_how(place: Path) -> None:
    from train.record import check_same_run

    Path("o/final").mkdir(parents=True)
    Path("o/final/config.json").write_text("{}")
    Path("o/run.json").write_text(json.dumps({"epochs": 1, "lr": 1}))
    with pytest.raises(train.errors.TrainError) as caught:
        check_same_run(Path("o"), {"epochs": 2, "lr": 1})
    assert "epochs: 1 -> 2" in str(caught.value)
    assert "`model: o/final` and another `output`." in str(caught.value)
    with pytest.raises(train.errors.TrainError) as caught:
        check_same_run(Path("o"), {"epochs": 1, "lr": 2})
    assert "final" not in str(caught.value)


@pytest.mark.parametrize("is_adapter", [False, True])
@pytest.mark.parametrize("is_finished", [False, True])
def test_more_epochs_name_a_model_that_is_there(place: Path, is_adapter: bool, is_finished: bool) -> None:
    """An adapter is folded first; without a final, the last checkpoint counts."""
    from train.record import check_same_run

    where = Path("o/checkpoints/step-00000010")
    for folder in (Path("o/checkpoints/step-00000009"), where, Path("o/final"))[: 3 if is_finished else 2]:
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        (folder / ("adapter_config.json" if is_adapter else "config.json")).write_text("{}")
    where = Path("o/final") if is_finished else where
    Path("o/run.json").write_text(json.dumps({"epochs": 1}))
    with pytest.raises(train.errors.TrainError) as caught:
        check_same_run(Path("o"), {"epochs": 2})
    expected = f"`merge-tool fold MODEL {where} FOLDED`, then `model: FOLDED`" if is_adapter else f"`model: {where}`"
    assert f"schedule of its own: {expected} and another `output`." in str(caught.value)


# --------------------------------------------------------------------------------------- what next


@pytest.mark.parametrize(
    ("architecture", "said", "unsaid"),
    [
        (
            "LlamaForCausalLM",
            ["AutoModelForCausalLM.from", "convert_hf_to_gguf.py", "vllm serve", "lms import"],
            [],
        ),
        ("BertModel", ["AutoModel.from_pretrained", "hf upload"], ["gguf", "vllm", "generate"]),
        ("", ["hf upload ORG/NAME OUT"], ["from_pretrained", "vllm"]),
    ],
)
def test_the_card_says_what_next_for_its_class_of_model(
    place: Path, architecture: str, said: list[str], unsaid: list[str]
) -> None:
    config = {"architectures": [architecture]} if architecture else {}
    for name in ("base", "ft"):
        (Path("m") / name / "config.json").write_text(json.dumps(config))
    succeed("merge", "m/base", "m/ft", "out", "-q")
    card = Path("out/README.md").read_text()
    section = card.partition("\n## What next\n")[2]
    assert all(part in section for part in said), section
    assert not any(part in section for part in unsaid), section
    assert "verified" in succeed("verify", "out", "--against", "m/base", "m/ft", "--full")


def test_the_snippet_of_the_card_runs(tmp_path: Path) -> None:
    """As it stands, with the output's folder in place of OUT."""
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, root / "examples/make_tiny_pair.py", tmp_path], check=True)
    merge(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    code = card.partition("## What next")[2].partition("```python\n")[2].partition("```")[0]
    code = code.replace('"OUT"', repr(str(tmp_path / "out")))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Once upon a time" in done.stdout
