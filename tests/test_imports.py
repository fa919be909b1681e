"""`import rlhf_env` stays quick: nothing heavy is loaded before it is used."""

import subprocess
import sys

import torch


def test_importing_the_package_loads_no_heavy_library():
    code = "import sys, rlhf_env; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "rlhf_env" in loaded
    assert not {"torch", "transformers", "stable_baselines3", "matplotlib"} & set(loaded)


def test_tests_run_on_one_thread():
    assert torch.get_num_threads() == 1
