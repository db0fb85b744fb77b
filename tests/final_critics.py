"""How useful the critics are that runs ended with, as CSV: python -m tests.final_critics RUN_FOLDERS

For runs of the TD3 family on Pendulum-v1: what the last line of their eval.csv says too, measured as the code
does it now.
"""

import csv
import sys
from pathlib import Path

import torch
import tyro

from common import BadInput
from common.args import one_sentence
from common.evaluate import as_policy, evaluate, load_script
from common.experiments.mage_gradients import load_networks
from common.files import loading
from common.run import EVAL_SEED
from common.true_gradients import gradient_quality


def main(run_dirs: tyro.conf.Positional[list[str]]):
    if not run_dirs:
        raise BadInput("name the folder of at least one run.")
    table = csv.writer(sys.stdout)
    for number, folder in enumerate(map(Path, run_dirs)):
        if (env_id := load_script(folder)[1]) != "Pendulum-v1":
            raise BadInput(f"{folder} is a run on {env_id}: name runs on Pendulum-v1.")
        with loading(folder):
            args, actor, critic = load_networks(folder)
        result = evaluate(as_policy(actor), args["env_id"], 10, seed=EVAL_SEED + args["seed"])
        row = gradient_quality(actor, critic, args["env_id"], args["gamma"], result.starts)
        if number == 0:
            table.writerow(["run", "seed", "return_mean", *row])
        table.writerow([folder.parent.name, args["seed"], f"{result.returns.mean():.4f}", *row.values()])


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in the scripts: small networks are fastest on one
    with one_sentence():
        tyro.cli(main, prog="python -m tests.final_critics", description=__doc__)
