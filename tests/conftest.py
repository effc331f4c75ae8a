"""Fixtures shared by all tests. Helpers that are plain functions live in checkpoints.py and oracle.py."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings

from checkpoints import language_model, save_model

# A shell that starts us in the background has SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("same", derandomize=True)  # the same examples in every run; pytest
settings.load_profile("same")  # --hypothesis-profile=default looks for new ones

# Among the longer checks, by the end of their names: a shorter test of the same law, or another case of it, is run
# with the others.
LONGER = (
    "test_contrast.py::test_the_same_command_goes_on_from_the_end_of_any_phase",
    "test_corpus.py::test_a_merge_writes_the_recorded_bytes[adapter-pickled]",
    "test_corpus.py::test_a_merge_writes_the_recorded_bytes[pickle-yaml]",
    "test_corpus.py::test_a_merge_writes_the_recorded_bytes[pickles-views]",
    "test_families.py::test_a_merge_is_loaded_by_transformers_and_is_right[multimodal (LLaVA)]",
    "test_first_hour.py::test_a_train_py_of_the_users_is_not_run[start1]",
    "test_first_hour.py::test_what_is_published_parses_to_the_same_recipe",
    "test_fp8_output.py::test_transformers_reads_the_output",
    "test_hosts.py::test_any_kind_of_merge_gives_the_same_files[union]",
    "test_hosts_again.py::test_a_recipe_of_relative_paths_is_worked_on_from_anywhere[chosen]",
    "test_hosts_again.py::test_a_recipe_of_relative_paths_is_worked_on_from_anywhere[dots]",
    "test_hosts_again.py::test_a_recipe_of_relative_paths_is_worked_on_from_anywhere[folders]",
    "test_hosts_again.py::test_a_recipe_of_relative_paths_is_worked_on_from_anywhere[options]",
    "test_hub.py::test_a_repository_of_nothing_but_weights_is_a_model[style.safetensors]",
    "test_hub.py::test_a_search_pins_hub_ids",
    "test_hub.py::test_pickled_weights_are_fetched_where_there_are_no_others[1]",
    "test_hub.py::test_pickled_weights_are_fetched_where_there_are_no_others[2]",
    "test_hub_ahead.py::test_a_recipe_beyond_the_layers_is_refused_before_a_weight_is_fetched",
    "test_hub_ahead.py::test_a_sweep_is_checked_before_a_weight_is_fetched",
    "test_hub_ahead.py::test_adapters_are_fetched_whole_and_their_model_is_not",
    "test_hub_ahead.py::test_offline_and_unreachable_say_what_they_said",
    "test_hub_ahead.py::test_output_and_cache_on_one_disk_must_fit_together",
    "test_hub_ahead.py::test_the_message_is_that_of_models_in_the_cache",
    "test_lora.py::test_models_and_adapters_of_the_hub",
    "test_lora.py::test_pickled_adapters_are_read_as_their_safetensors_which_win",
    "test_lora.py::test_the_budget_holds_with_rescaled_rows[True]",
    "test_memory.py::test_a_tensor_ten_times_the_budget_is_merged_below_it[8]",
    "test_memory.py::test_ten_thousand_tensors_stay_below_the_least_budget[asked4]",
    "test_memory.py::test_what_would_not_fit_is_refused_with_the_figure",
    "test_notebook.py::test_it_looks_merges_checks_and_compares",
    "test_notebook.py::test_it_pushes_the_whole_output",
    "test_output.py::test_signals_leave_work_that_continues[2-130]",
    "test_output.py::test_signals_leave_work_that_continues[9--9]",
    "test_pickle.py::test_a_torchscript_archive_says_how_to_save_its_weights[.pt]",
    "test_pickle.py::test_transformers_loads_the_merge_of_its_pickles",
    *(
        f"test_python_words.py::test_a_result_fits_a_screen[{kind}]"
        for kind in ("diff", "inspection", "plan", "summary")
    ),
    "test_python_words.py::test_a_result_fits_a_screen[verification]",
    "test_scribe.py::test_a_model_offline_and_not_cached_is_one_line",
    "test_scribe.py::test_what_the_trainer_cannot_have_is_one_line",
    "test_stream.py::test_a_server_that_never_recovers_is_given_up",
    "test_stream.py::test_addresses_that_expire_are_found_again",
    "test_stream.py::test_what_passes_is_tried_again",
    "test_to_hub.py::test_what_passes_is_tried_again",
    "test_train_checkpoint.py::test_a_signal_saves_and_exits_cleanly[2]",
    "test_train_checkpoint.py::test_killed_during_a_save_the_previous_checkpoint_loads",
    "test_train_cli.py::test_under_torchrun_one_process_prints",
    "test_train_push.py::test_the_result_is_pushed_and_a_missing_token_is_found_first",
    "test_vocab.py::test_the_budget_holds_with_a_vocabulary_of_ordinary_size",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.endswith(LONGER):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output files may be smaller than a user may make them; small_shards.py does it for processes."""
    monkeypatch.setattr("merge_tool.cli.options.LEAST_SHARD_BYTES", 1)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A small base and finetune, sharded differently, with side files."""
    side = {"tokenizer.json": "{}", "generation_config.json": '{"eos_token_id": 0}\n', "sub/chat.jinja": "{{ x }}"}
    base = save_model(tmp_path / "base", language_model(0), shards=2, side_files=side)
    ft = save_model(tmp_path / "ft", language_model(1), shards=3, side_files=side)
    return base, ft
