import json

import numpy as np
import pytest
import yaml

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.records.run import Run

CONFIG = {"world": "reviews", "seed": 7, "ppo": {"learning_rate": 1e-05, "clip": 0.2}, "note": "Größe: ja"}


def test_a_new_run_begins_with_the_config_that_replays_it(tmp_path):
    run = Run.create(tmp_path / "runs" / "a", CONFIG)
    text = (tmp_path / "runs" / "a" / "config.yaml").read_text(encoding="utf-8")
    assert list(yaml.safe_load(text)) == ["world", "seed", "ppo", "note"]
    assert run.config == Run.open(run.path).config == CONFIG


def test_a_folder_with_anything_in_it_is_left_alone(tmp_path):
    Run.create(tmp_path / "a", CONFIG).log({"update": 1})
    with pytest.raises(ConfigError, match="a exists and is not an empty folder"):
        Run.create(tmp_path / "a", {"seed": 8})
    assert Run.open(tmp_path / "a").config == CONFIG
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file exists"):
        Run.create(tmp_path / "file", CONFIG)


def test_an_empty_folder_can_become_a_run(tmp_path):
    assert Run.create(tmp_path, CONFIG).path == tmp_path


def test_what_a_kill_left_of_a_file_does_not_stop_the_next_run(tmp_path):
    (tmp_path / ".config.yaml.4711.tmp").write_bytes(b"half a co")
    assert Run.create(tmp_path, CONFIG).config == CONFIG


def test_a_config_that_could_not_be_replayed_makes_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="no plain YAML value"):
        Run.create(tmp_path / "a", {"model": object()})
    assert not (tmp_path / "a").exists()


def test_only_a_run_can_be_opened(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        Run.open(tmp_path)


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "\x00", "model: !!python/object/apply:os.getcwd []"])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match="config.yaml"):
        _ = Run.open(tmp_path).config


def test_metrics_are_on_disk_at_once_and_missing_values_are_missing_keys(tmp_path):
    run = Run.create(tmp_path, CONFIG)
    run.log({"update": 1, "kl": 0.5, "loss": float("nan"), "ratio": np.float32("inf"), "stop": "eos"})
    run.log({"update": 2, "kl": np.float32(0.25)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"update": 1, "kl": 0.5, "stop": "eos"}\n{"update": 2, "kl": 0.25}\n'
    assert run.metrics == [{"update": 1, "kl": 0.5, "stop": "eos"}, {"update": 2, "kl": 0.25}]


def test_resuming_forgets_later_rows_and_one_cut_short(tmp_path):
    run = Run.create(tmp_path, CONFIG)
    run.truncate_metrics(0)  # nothing was logged yet
    for update in (1, 2, 3):
        run.log({"update": update, "kl": update / 4})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"update": 2, "k')
    run.truncate_metrics(2)
    run.log({"update": 3, "kl": 9.0})
    assert run.metrics == [{"update": 1, "kl": 0.25}, {"update": 2, "kl": 0.5}, {"update": 3, "kl": 9.0}]
    run.truncate_metrics(0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_summary_samples_and_card(tmp_path):
    run = Run.create(tmp_path, CONFIG)
    run.write_summary({"score": 1.5, "kl": float("nan")})
    run.write_samples([{"prompt": "a", "response": "\x1b[2J"}])
    run.write_card("# Card\n\nGröße\n")
    assert json.loads((tmp_path / "summary.json").read_text()) == run.summary == {"score": 1.5}
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == {"prompt": "a", "response": "\x1b[2J"}
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# Card\n\nGröße\n"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.yaml", "summary.json", "samples.jsonl", "README.md"}
