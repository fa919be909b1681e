"""The commands. Nothing heavy is imported before a command needs it, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys

import typer

from rlhf_env.cli.demo import demo
from rlhf_env.cli.grid import MORE_TO_GRID, grid
from rlhf_env.cli.inform import agents, doctor, worlds
from rlhf_env.cli.measure import MORE_TO_EVALUATE, MORE_TO_GENERATE, evaluate, generate
from rlhf_env.cli.online import MORE_TO_ONLINE, online
from rlhf_env.cli.pipeline import MORE_TO_PIPELINE, inspect, pipeline
from rlhf_env.cli.preferences import preferences
from rlhf_env.cli.reward_eval import MORE_TO_REWARD_EVAL, reward_eval
from rlhf_env.cli.serve import serve_reward
from rlhf_env.cli.stages import MORE_TO_PREFER, MORE_TO_REVISE, MORE_TO_REWARD, MORE_TO_SFT, prefer, revise, reward, sft
from rlhf_env.cli.train import MORE_TO_TRAIN, train
from rlhf_env.errors import ConfigError, RLHFEnvError
from rlhf_env.processes import started_by_torchrun
from rlhf_env.records.safe_text import safe_text

app = typer.Typer(
    help="Train language models with reinforcement learning from a reward model, on a laptop first.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command(epilog=MORE_TO_PIPELINE)(pipeline)
app.command(epilog=MORE_TO_ONLINE)(online)
app.command(epilog=MORE_TO_SFT)(sft)
app.command(epilog=MORE_TO_PREFER)(prefer)
app.command(epilog=MORE_TO_REVISE)(revise)
app.command(epilog=MORE_TO_REWARD)(reward)
app.command("reward-eval", epilog=MORE_TO_REWARD_EVAL)(reward_eval)
app.command(epilog=MORE_TO_TRAIN)(train)
app.command(epilog=MORE_TO_EVALUATE)(evaluate)
app.command(epilog=MORE_TO_GENERATE)(generate)
app.command(epilog=MORE_TO_GRID)(grid)
app.command()(inspect)
app.command("serve-reward")(serve_reward)
app.add_typer(preferences)
app.add_typer(worlds, name="worlds")
for _command in (agents, doctor):
    app.command()(_command)


def main() -> None:
    """Run the command line: exit code 0, 1 after one line of what is wrong, 2 for wrong usage, 130 for Ctrl-C.

    `train` and the pipeline's training keep what they have learned when they get SIGTERM, too, and exit with 143.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on two threads, and results depend on it
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    several = started_by_torchrun() > 1
    try:
        if several and "train" not in sys.argv[1:2]:
            raise ConfigError("only `rlhf-env train` works in several processes: start this without torchrun")
        app(prog_name="rlhf-env")
    except (RLHFEnvError, OSError) as error:
        where = f"[process {os.environ.get('RANK')}] " if several else ""
        print(f"{where}error: {safe_text(str(error))}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
