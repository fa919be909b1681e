import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from rlhf_env.errors import ConfigError
from rlhf_env.models.tiny import tiny_config
from rlhf_env.reward_models import ClassifierReward, VaderReward, load_reward
from rlhf_env.text.tokenizers import byte_tokenizer

MODULE = """
def length(prompts, responses):
    return [len(r) for r in responses]

class Constant:
    def score(self, prompts, responses):
        return [7.0] * len(responses)

class Picky:
    def __init__(self, path): ...

constant = Constant()
number = 3
"""


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import no_such_library")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("my_rewards", "broken_rewards"):
        sys.modules.pop(name, None)


def save_classifier(folder, labels):
    config = tiny_config("gpt2", 259, n_layer=1, n_embd=8, n_head=1, n_positions=16, pad_token_id=258)
    config.num_labels = labels
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def test_a_built_in_name():
    assert isinstance(load_reward("vader"), VaderReward)


@pytest.mark.parametrize(("name", "expected"), [("length", 2), ("Constant", 7), ("constant", 7)])
def test_a_function_class_or_object_of_a_module_in_the_current_directory(my_module, name, expected):
    before = list(sys.path)
    reward = load_reward(f"my_rewards:{name}")
    np.testing.assert_array_equal(getattr(reward, "score", reward)(["p"], ["ab"]), [expected])
    assert sys.path == before


def test_a_folder_and_a_label_of_it(tmp_path):
    save_classifier(tmp_path / "one", labels=1)
    save_classifier(tmp_path / "two", labels=2)
    assert isinstance(load_reward(str(tmp_path / "one")), ClassifierReward)
    assert load_reward(f"{tmp_path / 'two'}:LABEL_1").label == 1
    with pytest.raises(ConfigError, match="LABEL_0"):
        load_reward(str(tmp_path / "two"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vadr", "Did you mean 'vader'"),
        ("nothing-like-it", "unknown reward model 'nothing-like-it'. Known are 'vader'"),
        ("no_such_module:f", "cannot import 'no_such_module'.*No module named"),
        ("broken_rewards:f", "cannot import 'broken_rewards'.*no_such_library"),
        ("my_rewards:lenght", "no such name; did you mean 'length'"),
        ("my_rewards:number", "no function and has no score"),
        ("my_rewards:Picky", "cannot be made without arguments.*path"),
        (".", "holds no config.json"),
        ("", "unknown reward model ''"),
    ],
)
def test_what_cannot_be_loaded_is_explained(my_module, spec, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(spec)


def test_public_names_are_loaded_only_when_asked_for():
    code = (
        "import sys, rlhf_env.reward_models as r; "
        "assert not {'torch', 'transformers', 'vaderSentiment'} & set(sys.modules); "
        "r.VaderReward; assert 'vaderSentiment' not in sys.modules; "
        "assert set(r.__all__) == set(r._MODULES) and all(getattr(r, name).__name__ == name for name in r.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
