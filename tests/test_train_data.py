"""Laws of sources.py, data.py and batches.py: what is learned, what is dropped, who sees which row when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train_fixtures import copy_rows, make_config, make_tokenizer, write_jsonl
from train.batches import Mixture, collate, pack, plan_rows
from train.chat import BadRow, Segment
from train.config import TrainConfig
from train.data import Examples, Source, SourceReport, open_sources, prepare_sources, report_table
from train.errors import TrainError
from train.sources import render_row

TOKENIZER = make_tokenizer()
QA = [{"prompt": "{question}", "response": "{answer}"}]


def prepared(tmp_path: Path, source: dict[str, Any], **config: Any) -> tuple[TrainConfig, list[Source]]:
    settings_ = make_config(sources=[source], **{"sequence_length": 96, **config})
    names = prepare_sources(settings_, TOKENIZER, tmp_path / "cache")
    return settings_, open_sources(settings_, tmp_path / "cache", names)


def texts(source: Source, part: str = "train") -> list[str]:
    examples = getattr(source, part)
    return [TOKENIZER.decode(examples.ids[examples.offsets[i] : examples.offsets[i + 1]]) for i in range(len(examples))]


def source_of(tmp_path: Path, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    return {"path": str(path), **({} if "messages" in more else {"templates": QA}), **more}


def render(row: dict[str, Any], tokenizer: Any = TOKENIZER, **source: Any) -> list[Segment]:
    config = make_config(sources=[{"path": "x.jsonl", **source}])
    try:
        (rendered,) = render_row(config.sources[0], row, tokenizer)
    except BadRow as e:  # whoever reads rows says which
        raise TrainError(str(e)) from e
    return rendered.segments


# ---- formats -------------------------------------------------------------------------------------------


def test_memphis_chat_learns_the_response_and_the_next_header() -> None:
    """`### User:` begins the next turn and ends this one: it is learned; the prompt is not."""
    assert render({"question": "Hi", "answer": "Yo"}, templates=QA) == [
        Segment("### User:\nHi\n### Assistant:\n", False),
        Segment("Yo\n### User:\n", True),
    ]


def test_tinycot_learns_rationale_answer_header_target_and_next_header() -> None:
    """Everything after the Rationale header."""
    template = {"prompt": "{p}", "rationale": "{r}", "response": "{t}"}
    assert render({"p": "1+1", "r": "add", "t": "2"}, templates=[template], format="tinycot") == [
        Segment("### User:\n1+1\n### Rationale:\n", False),
        Segment("add\n### Answer:\n2\n### User:\n", True),
    ]


def test_messages_learn_every_assistant_turn() -> None:
    """The header that ends a turn is not repeated; a system message comes first and is not learned."""
    turns = [
        ("system", "S"),
        ("user", "A"),
        ("assistant", "B"),
        ("user", "C"),
        ("assistant", "D"),
        ("user", "E"),
    ]
    row = {"m": [{"role": r, "content": c} for r, c in turns]}
    assert render(row, messages="m") == [
        Segment("### System:\nS\n### User:\nA\n### Assistant:\n", False),
        Segment("B\n### User:\n", True),
        Segment("C\n### Assistant:\n", False),
        Segment("D\n### User:\n", True),
    ]


def test_a_chat_template_gives_the_same_text_as_the_tokenizer() -> None:
    """The segments join to what apply_chat_template writes; only assistant turns are learned."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    row = {"m": [{"role": r, "content": c} for r, c in [("user", "A"), ("assistant", "B")] * 2]}
    segments = render(row, tokenizer, messages="m", format="chat-template")
    assert "".join(s.text for s in segments) == tokenizer.apply_chat_template(row["m"], tokenize=False)
    assert [s.text for s in segments if s.learned] == ["B<end>", "B<end>"]
    with pytest.raises(TrainError, match=r"no chat template\. Set format: memphis-chat"):
        render(row, messages="m", format="chat-template")


# Qwen3's habits: reasoning is written in the last turn alone, tool calls as JSON, tools in front.
THINKING = (
    "{% if tools %}[{% for t in tools %}{{ t.name }}{% endfor %}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content and loop.last %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}"
    "<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}


def test_a_template_gets_the_whole_message() -> None:
    """Tool calls, their answers and the tools; what is null, `datasets` has added."""
    tokenizer = make_tokenizer(chat_template=THINKING)
    call = {"function": {"name": "weather", "arguments": {"city": "Rome", "unit": None}}}
    turns = [
        {"role": "user", "content": "A", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "name": "weather", "tool_calls": None},
        {"role": "assistant", "content": [{"type": "text", "text": "Sun"}], "tool_calls": None},
    ]
    for tools in ([{"name": "weather", "strict": None}], '[{"name": "weather"}]'):
        row = {"m": turns, "t": tools}
        segments = render(row, tokenizer, messages="m", tools="t", format="chat-template")
        called = '<call>weather{"city": "Rome"}</call><end>'
        text = f"[weather]<user>A<end><assistant>{called}<tool>sunny<end><assistant>Sun<end>"
        assert "".join(s.text for s in segments) == text
        assert [s.text for s in segments if s.learned] == [called, "Sun<end>"]
    with pytest.raises(TrainError, match="column t is 'no JSON', expected a list of tools"):
        render({"m": turns, "t": "no JSON"}, tokenizer, messages="m", tools="t", format="chat-template")


def test_of_turns_that_a_template_rewrites_the_last_is_learned_and_counted(tmp_path: Path) -> None:
    """The model never sees an earlier turn with its reasoning: what is exact is the last one."""
    tokenizer = make_tokenizer(chat_template=THINKING)
    plain = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    thought = [*plain[:1], {"role": "assistant", "content": "B", "reasoning_content": "hm"}]
    row = {"m": [*thought, *thought]}
    segments = render(row, tokenizer, messages="m", format="chat-template")
    whole = tokenizer.apply_chat_template(row["m"], tokenize=False)
    before = "<user>A<end><assistant>B<end><user>A<end><assistant>"
    assert [s.text for s in segments] == [before, "<think>hm</think>B<end>"]
    assert "".join(s.text for s in segments) == whole
    one = render({"m": thought}, tokenizer, messages="m", format="chat-template")
    assert [s.text for s in one if s.learned] == ["<think>hm</think>B<end>"]
    rows = [{"m": turns} for turns in ([*thought, *thought], [*plain, *plain], thought)]
    source = source_of(tmp_path, rows, messages="m", format="chat-template", label="chats")
    config = make_config(sources=[source])
    (found,) = open_sources(config, tmp_path, prepare_sources(config, tokenizer, tmp_path))
    assert (found.report.examples, found.report.last_turn_only) == (3, 1)
    assert report_table([found.report]).splitlines()[-1] == (
        "chats: the chat template writes earlier turns in another way in 1 examples; of those only the last turn is "
        "learned."
    )


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content", "thinking", "function_call"])
def test_what_a_format_would_leave_out_is_refused(key: str) -> None:
    """By memphis-chat always; by a template if the text is the same without it."""
    said = [CALL] if key == "tool_calls" else "hm"
    row = {"m": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B", key: said}]}
    with pytest.raises(TrainError, match=f"a message has {key}, which memphis-chat cannot write"):
        render(row, messages="m")
    silent = make_tokenizer(chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
                            "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
    with pytest.raises(TrainError, match=f"a message has {key}, which the tokenizer's chat template does not write"):
        render(row, silent, messages="m", format="chat-template")


def test_tools_are_for_a_chat_template() -> None:
    with pytest.raises(TrainError, match="tools is for chat-template, the format is memphis-chat"):
        make_config(sources=[{"path": "x.jsonl", "messages": "m", "tools": "t"}])


def test_text_is_learned_everywhere() -> None:
    """One segment; braces can be written; an empty cell is empty text."""
    row = {"a": "x", "b": None}
    assert render(row, templates=[{"text": "{{{a}}}{b}"}], format="text") == [Segment("{x}", True)]


def test_an_empty_response_is_no_example() -> None:
    """Nothing but the header would be learned."""
    assert render({"question": "Hi", "answer": "  "}, templates=QA) == []


def test_a_wrong_role_is_named() -> None:
    """The role found and those expected."""
    with pytest.raises(TrainError, match="role 'robot', expected system, user or assistant"):
        render({"m": [{"role": "robot", "content": "x"}]}, messages="m")
    with pytest.raises(TrainError, match="expected a list of"):
        render({"m": "text"}, messages="m")


def test_labels_are_the_learned_tokens_alone(tmp_path: Path) -> None:
    """Each label is the next token, where that is learned; the segments are tokenised apart."""
    _, (source,) = prepared(tmp_path, source_of(tmp_path, copy_rows(1)))
    batch = Mixture([source], make_config(micro_batch=1), 0, 1).step_batches(0, 0)[0]
    segments = render(copy_rows(1)[0], templates=QA)
    ids = [TOKENIZER(s.text, add_special_tokens=False)["input_ids"] for s in segments]
    expected = [-100] * (len(ids[0]) - 1) + ids[1] + [-100]
    assert batch.ids[0].tolist() == ids[0] + ids[1]
    assert batch.labels[0].tolist() == expected


# ---- rows ----------------------------------------------------------------------------------------------


def test_where_casts_strings_sorts_and_takes(tmp_path: Path) -> None:
    """Scores that are strings are compared as numbers, so that "9" is not above "10"."""
    source = source_of(
        tmp_path, copy_rows(30), take=3,
        where=[
            {"column": "score", "op": ">", "value": 9, "cast": "int"},
            {"column": "number", "op": "not in", "value": [11]},
        ],
        sort={"column": "score", "cast": "int"}, templates=[{"prompt": "{number}", "response": "{answer}"}],
    )  # fmt: skip
    _, (found,) = prepared(tmp_path, source)
    assert [t.split("\n")[1] for t in texts(found)] == ["10", "12", "13"]
    assert (found.report.rows, found.report.rows_kept) == (30, 19)


def test_a_comparison_without_a_cast_says_what_to_add(tmp_path: Path) -> None:
    """Text against a number is an error, not a silent nothing; a bad cast names the value."""
    where = {"column": "score", "op": ">", "value": 9}
    with pytest.raises(TrainError, match=r"score holds '0' \(str\).*Add `cast: int`"):
        prepared(tmp_path, source_of(tmp_path, copy_rows(3), where=[where]))
    with pytest.raises(TrainError, match=r"column question holds .*, which cannot be cast to int"):
        prepared(
            tmp_path,
            source_of(tmp_path, copy_rows(3), where=[{**where, "column": "question", "cast": "int"}]),
        )


def test_take_counts_examples_that_fit(tmp_path: Path) -> None:
    """Two templates give two examples a row; over-long ones are dropped, counted, and replaced."""
    rows = copy_rows(10)
    rows[0]["answer"] = "long " * 200
    both = [*QA, {"prompt": "{answer}", "response": "{question}"}]
    _, (found,) = prepared(tmp_path, source_of(tmp_path, rows, take=5, templates=both))
    assert found.report.examples == 5
    assert found.report.dropped_long == 2
    assert found.report.tokens == int(found.train.offsets[-1]) == int(found.train.lengths.sum())


def test_held_out_rows_are_split_before_templates(tmp_path: Path) -> None:
    """Both directions of a row are on one side, and nothing is on both."""
    both = [*QA, {"prompt": "{number}", "response": "{number}"}]
    rows = [{**row, "question": f"q{i}", "answer": f"q{i}", "number": f"n{i}"} for i, row in enumerate(copy_rows(20))]
    _, (found,) = prepared(tmp_path, source_of(tmp_path, rows, held_out=0.25, templates=both))
    sides = [{t.split("\n")[1][1:] for t in texts(found, part)} for part in ("train", "held_out")]
    assert [len(s) for s in sides] == [15, 5]
    assert not sides[0] & sides[1]
    assert (found.report.rows_held_out, found.report.held_out_examples) == (5, 10)


def test_missing_columns_and_empty_results_are_errors(tmp_path: Path) -> None:
    """The columns that exist are listed; so are the counts that led to nothing."""
    with pytest.raises(TrainError, match=r"no column 'asnwer'. Its columns are .*question"):
        prepared(
            tmp_path,
            source_of(tmp_path, copy_rows(3), templates=[{"prompt": "{question}", "response": "{asnwer}"}]),
        )
    with pytest.raises(TrainError, match=r"gives no example\. 3 rows, 0 after `where`"):
        prepared(tmp_path, source_of(tmp_path, copy_rows(3), where=[{"column": "number", "op": ">", "value": 99}]))
    with pytest.raises(TrainError, match=r"gives no example\. 3 rows, 3 after .*3 examples longer than"):
        prepared(tmp_path, source_of(tmp_path, copy_rows(3)), sequence_length=4)
    with pytest.raises(TrainError, match="held_out is 3 of 3 rows, which is all"):
        prepared(tmp_path, source_of(tmp_path, copy_rows(3), held_out=3))
    with pytest.raises(TrainError, match="there is no file"):
        prepared(tmp_path, {"path": str(tmp_path / "absent.jsonl"), "templates": QA})
    with pytest.raises(TrainError, match=r"row 1: \{question\.x\}: column question is .*, which has no x"):
        prepared(
            tmp_path,
            source_of(tmp_path, copy_rows(3), templates=[{"prompt": "{question.x}", "response": "y"}]),
        )


def test_csv_and_parquet_give_what_jsonl_gives(tmp_path: Path) -> None:
    """The three local formats, through the same library."""
    import pandas

    frame = pandas.DataFrame(copy_rows(5))
    frame.to_csv(tmp_path / "d.csv", index=False)
    frame.to_parquet(tmp_path / "d.parquet")
    _, (expected,) = prepared(tmp_path, source_of(tmp_path, copy_rows(5)))
    for name in ("d.csv", "d.parquet"):
        _, (found,) = prepared(tmp_path, {"path": str(tmp_path / name), "templates": QA})
        assert texts(found) == texts(expected)


def test_nothing_is_tokenised_twice(tmp_path: Path) -> None:
    """A second call reads the store; the key follows the content, not the file's name or a weight."""
    source = source_of(tmp_path, copy_rows(5))
    config = make_config(sources=[source], sequence_length=96)
    (name,) = prepare_sources(config, TOKENIZER, tmp_path / "cache")
    stamp = (tmp_path / "cache" / name / "train.ids.npy").stat().st_mtime_ns
    other = write_jsonl(tmp_path / "renamed.jsonl", copy_rows(5))
    again = make_config(sources=[{**source, "path": str(other), "weight": 2.0}], sequence_length=96)
    assert prepare_sources(config, _refuses, tmp_path / "cache") == [name]
    assert (tmp_path / "cache" / name / "train.ids.npy").stat().st_mtime_ns == stamp
    assert prepare_sources(again, _refuses, tmp_path / "cache") == [name]
    changed = write_jsonl(tmp_path / "d.jsonl", copy_rows(6))
    longer = make_config(sources=[{**source, "path": str(changed)}], sequence_length=96)
    assert prepare_sources(longer, TOKENIZER, tmp_path / "cache") != [name]


def test_a_store_that_was_left_half_written_is_written_anew(tmp_path: Path) -> None:
    """Without its report a store does not count, whatever a killed run left in it."""
    config, (found,) = prepared(tmp_path, source_of(tmp_path, copy_rows(5)))
    store = tmp_path / "cache" / found.digest
    expected = (store / "train.ids.npy").read_bytes()
    (store / "report.json").unlink()
    (store / "train.ids.npy").write_bytes(b"half")
    assert prepare_sources(config, TOKENIZER, tmp_path / "cache") == [found.digest]
    assert (store / "train.ids.npy").read_bytes() == expected


def test_every_row_of_a_source_is_counted(tmp_path: Path) -> None:
    """Rows in the file, rows after `where`, rows held out of those; examples and tokens of what is left."""
    where = [{"column": "number", "op": "<", "value": 12}]
    _, (found,) = prepared(tmp_path, source_of(tmp_path, copy_rows(20), where=where, held_out=3))
    report = found.report
    assert (report.rows, report.rows_kept, report.rows_held_out) == (20, 12, 3)
    assert (report.examples, report.held_out_examples) == (9, 3)
    assert (report.tokens, report.labelled_tokens) == (len(found.train.ids), found.train.learned.sum())
    assert report.held_out_tokens == found.held_out.learned.sum()


class _Refuses:
    """The same tokenizer by content, but calling it is an error."""

    backend_tokenizer = TOKENIZER.backend_tokenizer
    chat_template = TOKENIZER.chat_template

    def __call__(self, *_: Any, **__: Any) -> None:
        raise AssertionError("tokenised twice")


_refuses = _Refuses()


# ---- the order -----------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=300),
    capacity=st.integers(50, 200),
)
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing_and_never_overflows(lengths: list[int], capacity: int) -> None:
    """Each example once; no row above its capacity; no two neighbours that would fit in one row."""
    items = [((0, i), n) for i, n in enumerate(lengths)]
    rows = pack(items, capacity)
    assert sorted(e for row in rows for _, e in row) == list(range(len(lengths)))
    sizes = [sum(lengths[e] for _, e in row) for row in rows]
    assert max(sizes) <= capacity
    if len(rows) <= 64:
        assert sum(size <= capacity / 2 for size in sizes) <= 1


def mixture(tmp_path: Path, world_size: int = 1, **config: Any) -> Mixture:
    settings_, sources = prepared(tmp_path, source_of(tmp_path, copy_rows(40)), **config)
    return Mixture(sources, settings_, 0, world_size)


def test_the_order_is_a_function_of_the_seed(tmp_path: Path) -> None:
    """Twice the same seed, twice the same batches, in any order of asking; another seed, another order."""
    values = {"global_batch": 4, "epochs": 3.0}
    first, second = mixture(tmp_path, seed=1, **values), mixture(tmp_path, seed=1, **values)
    steps = list(range(first.steps))
    backwards = {s: second.step_batches(s, 0)[0].ids for s in reversed(steps)}
    assert all((first.step_batches(s, 0)[0].ids == backwards[s]).all() for s in steps)
    other = mixture(tmp_path, seed=2, **values).step_batches(0, 0)[0].ids
    mine = first.step_batches(0, 0)[0].ids
    assert other.shape != mine.shape or bool((other != mine).any())


def test_the_order_is_the_one_of_earlier_versions(tmp_path: Path) -> None:
    """A run that an earlier version began goes on with the same rows: shuffled, held out and in order, as recorded."""
    source = source_of(tmp_path, copy_rows(8), held_out=2, shuffle=5, weight=1.5)
    config, (found,) = prepared(tmp_path, source, seed=7, packing=False)
    rows = [row["answer"] for row in copy_rows(8)]
    answers = {part: [rows.index(text.split("\n")[1]) for text in texts(found, part)] for part in ("train", "held_out")}
    assert answers == {"train": [5, 1, 4, 0, 2, 6], "held_out": [3, 7]}
    order = [example for epoch in range(2) for ((_, example),) in plan_rows([found], config, epoch)]
    assert order == [5, 3, 3, 2, 1, 4, 5, 0, 4, 2, 4, 0, 2, 5, 1, 3, 1, 0]


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_share_the_global_batch(tmp_path: Path, packing: bool) -> None:
    """Two processes together see the rows that one would see, each row once."""
    values = {"global_batch": 4, "micro_batch": 1, "packing": packing}
    alone, shared = mixture(tmp_path, 1, **values), mixture(tmp_path, 2, **values)
    assert alone.steps == shared.steps

    def rows(batches: list[Any]) -> list[list[int]]:
        return sorted(b.ids[0].tolist() for b in batches)

    for step in range(alone.steps):
        both = shared.step_batches(step, 0) + shared.step_batches(step, 1)
        assert rows(both) == rows(alone.step_batches(step, 0))


def test_weights_are_passes_over_a_source(tmp_path: Path) -> None:
    """Weight 2 gives each example twice an epoch; a half, all of them in two epochs, none twice."""
    _, (source,) = prepared(tmp_path, source_of(tmp_path, copy_rows(10)))

    def counts(weight: float, epochs: range) -> list[int]:
        config = make_config(sources=[{"path": "d.jsonl", "templates": QA, "weight": weight}], sequence_length=96)
        found = [e for epoch in epochs for row in plan_rows([source], config, epoch) for _, e in row]
        return np.bincount(found, minlength=10).tolist()

    assert counts(2.0, range(1)) == [2] * 10
    assert sum(counts(0.5, range(1))) == 5
    assert counts(0.5, range(2)) == [1] * 10
    assert sorted(counts(1.5, range(1))) == [1] * 5 + [2] * 5


@given(
    count=st.integers(1, 12),
    weight=st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.7, 2.0, 3.25]),
    epochs=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_epochs_share_out_one_endless_row_of_passes(count: int, weight: float, epochs: int) -> None:
    """However many epochs: they take weight x count examples each, to a rounding, also the last; and no example is
    taken again before each other one was taken as often."""
    source = Source("d.jsonl", _examples([4] * count), _examples([]), None, "")  # type: ignore[arg-type]
    config = make_config(
        sources=[{"path": "d.jsonl", "templates": QA, "weight": weight}], sequence_length=96, packing=False
    )
    seen: list[int] = []
    for epoch in range(epochs):
        seen += [example for ((_, example),) in plan_rows([source], config, epoch)]
        assert len(seen) == round(count * weight * (epoch + 1))
        times = np.bincount(seen, minlength=count)
        assert times.max() - times.min() <= 1


def _examples(lengths: list[int]) -> Examples:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Examples(np.zeros(offsets[-1], np.int32), np.ones(offsets[-1], np.bool_), offsets)


@pytest.mark.parametrize("epochs", [1.0, 1.5, 2.75])
def test_a_fraction_of_an_epoch_is_a_fraction_of_its_own_rows(epochs: float) -> None:
    """Packed epochs differ in their number of rows; the last, cut one counts with its own."""
    lengths = np.random.default_rng(0).integers(5, 90, 60).tolist()
    source = Source("d.jsonl", _examples(lengths), _examples([]), None, "")  # type: ignore[arg-type]
    asked = {"path": "d.jsonl", "templates": QA, "weight": 0.6}
    config = make_config(sources=[asked], sequence_length=96, epochs=epochs)
    sizes = [len(plan_rows([source], config, epoch)) for epoch in range(4)]
    assert len(set(sizes)) == 4, "the lengths above are meant to make all epochs unlike"
    whole = int(epochs)
    expected = sum(sizes[:whole]) + int((epochs - whole) * sizes[whole])
    mixed = Mixture([source], config, 0, 1)
    assert mixed.steps == expected
    rows = [row for epoch in range(4) for row in plan_rows([source], config, epoch)]
    assert [mixed.row(number) for number in range(expected)] == rows[:expected]


def test_steps_follow_epochs_or_max_steps(tmp_path: Path) -> None:
    """Whole global batches only; too few sequences is an error that says what to change."""
    assert mixture(tmp_path, packing=False, global_batch=4, epochs=2.5).steps == 25
    assert mixture(tmp_path, packing=False, global_batch=4, max_steps=1000).steps == 1000
    with pytest.raises(TrainError, match="40 sequences, fewer than one global batch of 64"):
        mixture(tmp_path, packing=False, global_batch=64)


def test_batches_isolate_examples(tmp_path: Path) -> None:
    """Positions restart with each example and with padding; no label crosses a border."""
    batch = mixture(tmp_path, micro_batch=4, global_batch=4).step_batches(0, 0)[0]
    for ids, labels, positions, lengths in zip(batch.ids, batch.labels, batch.positions, batch.lengths, strict=True):
        starts = [t for t in range(len(ids)) if positions[t] == 0]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[start:stop].tolist() == list(range(stop - start))
            assert labels[stop - 1] == -100
            assert set(lengths[start:stop].tolist()) <= {stop - start, 0}
            learned = [t for t in range(start, stop - 1) if labels[t] != -100]
            assert all(labels[t] == ids[t + 1] for t in learned)


def test_a_batch_of_two_packed_and_one_single_example_by_hand() -> None:
    """Every cell of the four arrays; padding restarts its positions after packed examples and goes on after one."""
    examples = Examples(
        ids=np.arange(10, 20, dtype=np.int32),
        learned=np.array([0, 1, 1, 0, 0, 1, 0, 0, 0, 1], np.bool_),
        offsets=np.array([0, 3, 5, 7, 10]),
    )
    batch = collate([[("b", examples, 0), ("a", examples, 1), ("b", examples, 2)], [("b", examples, 3)]], 9)
    assert batch.ids.tolist() == [[10, 11, 12, 13, 14, 15, 16], [17, 18, 19, 9, 9, 9, 9]]
    assert batch.labels.tolist() == [[11, 12, -100, -100, -100, -100, -100], [-100, 19, -100, -100, -100, -100, -100]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]
    assert batch.lengths.tolist() == [[3, 3, 3, 2, 2, 2, 2], [3, 3, 3, 0, 0, 0, 0]]
    assert batch.sources == ("a", "b")
    two = collate([[("b", examples, 0), ("a", examples, 1)], [("b", examples, i) for i in range(4)]], 9)
    assert two.positions[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("eval_batches", [None, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_held_out_examples(tmp_path: Path, world_size: int, eval_batches: int | None) -> None:
    """All ranks get equally many batches; together they hold each held-out label once, and nothing else."""
    config, (source,) = prepared(
        tmp_path, source_of(tmp_path, copy_rows(20), held_out=7), micro_batch=2, eval_batches=eval_batches, max_steps=1
    )
    mixed = Mixture([source], config, 0, world_size)
    shares = [list(mixed.held_out_batches(source, rank)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    labels = torch.cat([batch.labels.flatten() for share in shares for batch in share])
    ids = [source.held_out.ids[source.held_out.offsets[i] : source.held_out.offsets[i + 1]] for i in range(7)]
    marks = [source.held_out.learned[source.held_out.offsets[i] : source.held_out.offsets[i + 1]] for i in range(7)]
    chosen = range(7 if eval_batches is None else 4)
    expected = [int(t) for i in chosen for t, mark in zip(ids[i][1:], marks[i][1:], strict=True) if mark]
    assert sorted(labels[labels != -100].tolist()) == sorted(expected)


def test_an_example_of_just_the_sequence_length_is_kept(tmp_path: Path) -> None:
    """One token less room, and it is dropped and counted."""
    source = source_of(tmp_path, copy_rows(1))
    _, (found,) = prepared(tmp_path, source)
    length = int(found.train.lengths[0])
    assert len(prepared(tmp_path, source, sequence_length=length)[1][0].train) == 1
    with pytest.raises(TrainError, match=f"1 examples longer than sequence_length {length - 1}"):
        prepared(tmp_path, source, sequence_length=length - 1)


def test_the_report_is_a_table_for_people() -> None:
    """Titles to the left, numbers to the right, thousands with commas."""
    reports = [SourceReport("a", 1200, 1000, 8, 992, 51234, 9876, 5, 3, 8, 400)]
    reports += [SourceReport("longer.jsonl", 3, 3, 0, 3, 30, 9, 0, 0, 0, 0)]
    assert report_table(reports).splitlines() == [
        "source         rows   kept  held out  examples  tokens  labelled  too long  empty",
        "a             1,200  1,000         8       992  51,234     9,876         5      3",
        "longer.jsonl      3      3         0         3      30         9         0      0",
    ]


def test_the_report_is_stored_beside_the_tokens(tmp_path: Path) -> None:
    """Counts survive in the store, so a resumed run prints what the first one did."""
    config, (source,) = prepared(tmp_path, source_of(tmp_path, copy_rows(5)))
    stored = json.loads((tmp_path / "cache" / source.digest / "report.json").read_text())
    assert stored["examples"] == source.report.examples == 5
    assert config.sources[0].title == source.report.title == "d.jsonl"


def test_empty_message_contents_are_nothing_and_parts_must_be_text() -> None:
    """A null content is no word "None"; parts of text are one text, others stop with the column's name."""
    source = {"messages": "turns", "templates": []}
    nothing = {"turns": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]}
    assert render(nothing, **source) == []
    assert render({"turns": None}, **source) == []
    text = {"type": "text", "text": "hi"}
    spoken = {"role": "assistant", "content": "B"}
    assert "hihi" in render({"turns": [{"role": "user", "content": [text, text]}, spoken]}, **source)[0].text
    parts = {"turns": [{"role": "user", "content": [text, {"type": "image", "url": "x"}]}, spoken]}
    with pytest.raises(TrainError, match="turns"):
        render(parts, **source)


def test_csv_cells_are_what_is_written(tmp_path: Path) -> None:
    """Only an empty cell is empty: None, NA and null are words; whole numbers stay whole beside an empty cell."""
    (tmp_path / "d.csv").write_text("question,answer\n1,None\n,NA\n3,null\n4,\n5,yes\n")
    source = {"path": str(tmp_path / "d.csv"), "templates": QA}
    _, (found,) = prepared(tmp_path, source)
    assert [t.split("\n")[1] for t in texts(found)] == ["1", "", "3", "5"]
    assert [t.split("\n")[3] for t in texts(found)] == ["None", "NA", "null", "yes"]
    assert found.report.dropped_empty == 1


def test_rows_that_cannot_be_sorted_come_last(tmp_path: Path) -> None:
    """An empty cell in the sorted column drops nothing."""
    rows = copy_rows(6)
    for number in (1, 4):
        rows[number]["number"] = None
    source = source_of(
        tmp_path, rows, sort={"column": "number", "descending": True},
        templates=[{"prompt": "{score}", "response": "{answer}"}],
    )  # fmt: skip
    _, (found,) = prepared(tmp_path, source)
    assert [t.split("\n")[1] for t in texts(found)] == ["5", "3", "2", "0", "1", "4"]


def test_a_share_that_holds_out_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"held_out is 0.01 of 6 rows, which is none. Raise it"):
        prepared(tmp_path, source_of(tmp_path, copy_rows(6), held_out=0.01))
