"""A file of several recipes: the output is what the recipes make one after the other, and nothing else is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from checkpoints import language_model, load_folder, save_model
from merge_tool import merge_models
from merge_tool.cli import merge_tool

LINEAR = (
    "merge_method: linear\nmodels:\n  - {{model: {}, parameters: {{weight: 0.3}}}}\n"
    "  - {{model: {}, parameters: {{weight: 0.7}}}}\n"
)
SLERP = "merge_method: slerp\nbase_model: {0}\nmodels: [{{model: {0}}}, {{model: {1}}}]\nparameters: {{t: 0.4}}\n"


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four models a to d in the current folder."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abcd"):
        save_model(tmp_path / name, language_model(seed))


def run(*texts: str, options: tuple[str, ...] = ()) -> Result:
    Path("recipe.yaml").write_text("---\n".join(texts))
    return CliRunner().invoke(merge_tool, ["run", "recipe.yaml", "out", *options])


def one_by_one(*steps: tuple[str, str]) -> None:
    for name, text in steps:
        Path(f"{name}.yaml").write_text(text)
        merge_models(f"{name}.yaml", f"by-hand/{name}")


CHAIN = (
    "name: first  # a comment\n" + LINEAR.format("a", "b"),
    "# another part\n" + SLERP.format("first", "c") + "name: 'second'\n",
    LINEAR.format("second", "first"),
)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_output_is_what_the_recipes_make_one_after_the_other(order: tuple[int, ...]) -> None:
    result = run(*(CHAIN[k] for k in order))
    assert result.exit_code == 0, result.output
    Path("by-hand").mkdir()
    one_by_one(
        ("first", LINEAR.format("a", "b")),
        ("second", SLERP.format("by-hand/first", "c")),
        ("out", LINEAR.format("by-hand/second", "by-hand/first")),
    )
    found, expected = load_folder(Path("out")), load_folder(Path("by-hand/out"))
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in expected.items()}
    assert not Path("out.parts").exists()
    assert CliRunner().invoke(merge_tool, ["verify", "out"]).exit_code == 0


def test_an_output_that_no_later_part_needs_is_removed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last part begins, the first one's output is gone."""
    import merge_tool.api as commands

    seen, real = list[list[str]](), commands.merge_recipe

    def watched(*arguments: object, **options: object) -> object:
        seen.append(sorted(path.name for path in Path("out.parts").iterdir()))
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(commands, "merge_recipe", watched)
    texts = CHAIN[0], CHAIN[1], LINEAR.format("second", "d")
    assert run(*texts).exit_code == 0
    assert seen == [[], ["first"], ["second"]]


def test_what_is_complete_stays_when_a_part_fails_and_the_same_command_continues() -> None:
    odd = language_model(2)
    removed = odd.pop("model.norm.weight")
    save_model(Path("c"), odd)
    result = run(*CHAIN)
    assert result.exit_code == 1
    assert "model.norm.weight" in result.output
    assert not Path("out").exists()
    save_model(Path("c"), {**odd, "model.norm.weight": removed})
    result = run(*CHAIN)
    assert result.exit_code == 0, result.output
    assert "out.parts/first: already complete" in result.output
    assert not Path("out.parts").exists()


def test_json_is_the_last_parts_report() -> None:
    result = run(*CHAIN, options=("--json", "--quiet"))
    assert json.loads(result.stdout)["method"] == "linear"


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ((LINEAR.format("a", "b"), LINEAR.format("a", "c")), "2 parts have no name. Give each part a name of its own"),
        ((CHAIN[0], CHAIN[0], CHAIN[2]), "2 parts have the name first"),
        ((CHAIN[0], CHAIN[1]), "all parts have names (first, second). Take away that of the part which is OUT"),
        ((CHAIN[0], LINEAR.format("a", "c")), "no part uses first"),
        (("name: x\n" + LINEAR.format("y", "a"), "name: y\n" + LINEAR.format("x", "a"), LINEAR.format("x", "y")),
         "x, y, the last part use each other"),
        (("name: a\n" + LINEAR.format("b", "c"), LINEAR.format("a", "b")),
         "a is a part of the recipe, and also a file or folder here"),
        (("name: a b\n" + LINEAR.format("b", "c"), LINEAR.format("a", "b")), "line 1: name is 'a b', expected one"),
        ((CHAIN[0], CHAIN[1], "merge_method: linear\nmodels: 3\n"), "recipe.yaml, line 15: models"),
        ((CHAIN[0], LINEAR.format("first", "nowhere")), "nowhere: no such file or folder"),
    ],
)  # fmt: skip
def test_all_parts_are_checked_before_one_is_made(texts: tuple[str, ...], problem: str) -> None:
    result = run(*texts)
    assert result.exit_code == 1
    assert problem in result.output
    assert not Path("out").exists()
    assert not Path("out.parts").exists()


@pytest.mark.parametrize("options", [("--set", "t=0.3"), ("--models-dir", "."), ("--dry-run",)])
def test_options_of_one_recipe_are_refused(options: tuple[str, ...]) -> None:
    result = run(*CHAIN, options=options)
    assert result.exit_code == 1
    assert f"{options[0]} is for a file of one recipe" in result.output


def test_a_document_without_content_is_no_part() -> None:
    assert run("# about this recipe\n", LINEAR.format("a", "b")).exit_code == 0
    assert not Path("out.parts").exists()
