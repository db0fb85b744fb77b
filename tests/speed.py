"""What learning costs on this machine: python -m tests.speed [--quick] [--threads N] [--device cuda]

With --tiny everything is measured once with networks of a few units, which says nothing but that it works.

Times are those of the scripts' own `update` and `train_model` at the paper's sizes on HalfCheetah-v4. What is
compared runs in turns in one process and the median is shown, so that ratios hold on a busy machine.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import maac_sac
from common.acceleration import WARM_UP, accelerate
from common.args import parse_args
from tests.conftest import ROOT, SCRIPTS, script, tiny
from tests.inner_functions import fill, inner_functions
from tests.transcription import mage_terms

ENV = ["--env-id", "HalfCheetah-v4"]
CLEANRL = [*ENV, "--actor-hidden", "256", "--critic-hidden", "256", "--batch-size", "256"]
SIZES = []  # not empty: those of the tests (--tiny)


class CountFlop(TorchDispatchMode):
    """Floating-point operations in matrix products; PyTorch's own counter fails at a double backward."""

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flop += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def gflop(job):
    with CountFlop() as counter:
        job()
    return counter.flop / 1e9


def seconds(jobs, turns, device):
    """Median time of every job {name: function}, all in each turn -> {name: seconds}. A job runs twice
    in a turn and the second one counts: what lay idle may have left the caches, or the memory.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = {name: [] for name in jobs}
    for job in jobs.values():
        for _ in range(WARM_UP + 1 if device.type == "cuda" else 1):  # until a graph is replayed
            job()
    for _ in range(turns):
        for name, job in jobs.items():
            job()
            wait()
            start = time.perf_counter()
            job()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_rate(device):
    """GFLOP/s of a product of two 1024 x 1024 matrices, the best of 30."""
    a, b = torch.randn(2, 1024, 1024, device=device)
    return 2 * 1024**3 / 1e9 / min(seconds({i: lambda: a @ b for i in range(30)}, 1, device).values())


def sizes_of(name):
    return tiny(name, env_id=ENV[1], eval_every=1000, eval_max_steps=20) if SIZES else []


def made(name, device, *argv):
    functions, inside = inner_functions(name, [*ENV, *sizes_of(name), *argv], device)
    fill(inside)
    return functions, inside


def transcription(v):
    """MAGE's critic update as it reads (tests/transcription.py): an ordinary backward pass through all of it,
    small updates of each parameter. v: what `update` closes over."""
    args, critic, target = v["args"], v["critic"], v["critic_target"]
    obs = v["buffer"].sample(args.batch_size)[0]
    with torch.no_grad():
        action = v["actor"](obs)
    member = torch.randint(args.ensemble_size, (len(obs),), device=obs.device)
    noise = torch.randn_like(obs), 0.2 * torch.randn_like(action)
    nets = (critic, v["actor_target"], target, v["model"], v["reward_of"], v["terminated_at"])
    terms = mage_terms(*nets, obs, action, member, *noise, args.gamma)
    v["critic_opt"].zero_grad()
    (terms[0] + args.lam * terms[1]).backward()
    torch.nn.utils.clip_grad_value_(critic.parameters(), 5.0)
    v["critic_opt"].step()
    with torch.no_grad():
        for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
            slow.data.copy_((1 - args.tau) * slow + args.tau * fast)


def maac_batch(v):
    """A gradient step of MAAC's model, every member on 256 rows."""
    if "model_opt" not in v:
        v["model_opt"] = maac_sac.adam(v["model"], v["args"].model_lr)
    obs, action, _, next_obs, _ = v["real"].sample(v["args"].ensemble_size, maac_sac.MODEL_BATCH)
    maac_sac.descend(v["model_opt"], maac_sac.model_losses(v["model"], obs, action, next_obs).mean())


def rest(name):
    """Seconds of an environment step without learning: act, step, store, log, its share of evaluations."""
    off = ["--updates-per-step", "0", "--learning-starts", "0", "--total-timesteps", "1000"]
    off += {"td3": [], "maac_sac": ["--horizon", "0", "--no-steve", "--real-ratio", "1"]}.get(
        name, ["--model-train-every", "1000000"])  # fmt: skip
    return run(name, *ENV, *sizes_of(name), *off)[0] / 1000


def run(name, *argv):
    """Trains in a folder that goes away -> seconds, the last line of train.csv as {column: text}."""
    module = script(name)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        args = parse_args(module.Args, module.PRESETS, [*argv, "--run-dir", f"{folder}/run"])
        start = time.perf_counter()
        module.train(args)
        passed = time.perf_counter() - start
        *_, last = Path(args.run_dir, "train.csv").read_text().splitlines()
        names = Path(args.run_dir, "train.csv").read_text().splitlines()[0]
    return passed, dict(zip(names.split(","), last.split(","), strict=True))


def memory(name, device):
    """Peak memory in MB of a process (on a GPU: of its tensors) that learns at the paper's sizes."""
    command = [sys.executable, "-m", "tests.speed", "--memory", name, "--device", device.type]
    done = subprocess.run(command + ["--tiny"] * bool(SIZES), cwd=ROOT, capture_output=True, text=True)
    return float(done.stdout)


def print_memory(name, device):
    functions, inside = made(name, device)
    for _ in range(3):
        for block, function in functions.items():
            function(*[True] * (block == "update" and name != "maac_sac"))
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:  # not getrusage, which remembers the process that started this one
        status = Path("/proc/self/status").read_text().split()
        print(int(status[status.index("VmHWM:") + 1]) / 2**10)


def learning(device, turns, ways, accelerated):
    """The first table: every script, every way to accelerate it, MAGE's transcription."""
    jobs, flop, args = {}, {}, {}
    for name in SCRIPTS:
        functions, inside = made(name, device)
        args[name] = inside["args"]
        for how in ways if name in accelerated else ["none"]:
            optimizers = [x for x in inside.values() if isinstance(x, torch.optim.Optimizer)]
            fast = {block: accelerate(f, how, device, optimizers) for block, f in functions.items()}
            parts = {"model": fast["train_model"]} if "train_model" in fast else {}
            if name == "maac_sac":
                parts = {"model": lambda v=inside: maac_batch(v), "critic and actor": fast["update"]}
            else:
                parts |= {"critic": lambda f=fast: f["update"](False),
                          "critic and actor": lambda f=fast: f["update"](True)}  # fmt: skip
            jobs |= {(name, how, part): job for part, job in parts.items()}
            flop |= {(name, part): gflop(job) for part, job in parts.items() if how == "none"}
        if name == "mage_td3":
            jobs[name, "naive", "critic"] = lambda v=inside: transcription(v)
    found, rate = seconds(jobs, turns, device), matmul_rate(device)
    print(f"a product of two 1024 x 1024 matrices: {rate:.0f} GFLOP/s\n")
    print(f"{'script':10} {'accelerate':10} {'update':17} {'ms':>9} {'GFLOP':>7} {'of matmul':>9}")
    for (name, how, part), value in found.items():
        count = flop.get((name, part)) if how != "naive" else None
        share = f"{count:7.2f} {count / value / rate:9.0%}" if count else ""
        print(f"{name:10} {how:10} {part:17} {1e3 * value:9.2f} {share}")

    def per_step(name, how):
        a, t = args[name], {part: found[name, how, part] for n, h, part in found if (n, h) == (name, how)}
        if name == "maac_sac":
            return a.updates_per_step * t["critic and actor"]  # the fits of its model stop early: not counted
        delayed = t["critic"] + (t["critic and actor"] - t["critic"]) / a.policy_delay
        batches = a.model_batches / a.model_train_every * t["model"] if name != "td3" else 0
        return a.updates_per_step * delayed + batches

    head = f"{'an environment step':20} {'learning, ms':>12} {'all else':>9} {'share':>6} {'memory, MB':>10}"
    print(f"\n{head}")
    for name in SCRIPTS:
        learn, other = per_step(name, "none"), rest(name)
        size = memory(name, device)
        share = other / (learn + other)
        print(f"{name:20} {1e3 * learn:12.1f} {1e3 * other:9.2f} {share:6.1%} {size:10.0f}")
    critic = {how: found["mage_td3", how, "critic"] for how in ("naive", *ways)}
    print()
    for how in ways:
        print(f"MAGE's critic update, naive / {how}: {critic['naive'] / critic[how]:.1f}")
    both = per_step("mage_td3", "none") / per_step("dyna_td3", "none")
    print(f"MAGE / Dyna-TD3, learning in an environment step: {both:.2f}")


def growth(device, turns):
    """The second table: how MAGE's critic update and MAAC's update grow."""
    series = {
        ("mage_td3", "--batch-size"): (256, 512, 1024, 2048),
        ("mage_td3", "--ensemble-size"): (1, 2, 4, 8, 16),
        ("mage_td3", "--model-hidden"): (128, 256, 512, 1024),
        ("mage_td3", "--critic-hidden"): (128, 256, 384, 512),
        ("maac_sac", "--horizon"): (0, 1, 2, 4, 8),
        ("maac_sac", "--num-samples"): (1, 2, 5, 10),
    }
    print("\nms of an update (MAGE: critic alone) with other sizes")
    for (name, flag), values in series.items():
        jobs = {}
        for value in values[:2] if SIZES else values:
            function = made(name, device, flag, str(value), "--buffer-size", "10000")[0]["update"]
            jobs[value] = function if name == "maac_sac" else lambda f=function: f(False)
        found = seconds(jobs, turns, device)
        print(f"{name:9} {flag:15}", "   ".join(f"{value}: {1e3 * t:.1f}" for value, t in found.items()))


def cleanrl_sizes(device, steps):
    """td3.py with CleanRL's TD3's sizes, one update per step, whole steps per second after the warm-up."""
    counts = ["--learning-starts", "200", "--eval-every", str(steps), "--total-timesteps", str(2 * steps)]
    _, last = run("td3", *CLEANRL, *sizes_of("td3"), *counts, "--eval-episodes", "0", "--device", device.type)
    print(f"\ntd3.py, batch 256, 2 x 256, one update per step: {float(last['steps_per_second']):.0f} steps/s")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns; only MAGE compiled; no growth")
    parser.add_argument("--tiny", action="store_true", help="one turn of tiny networks: does it work?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", choices=SCRIPTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    SIZES[:] = [True] * args.tiny
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    if args.memory:
        print_memory(args.memory, device)
        return
    turns = 1 if args.tiny else 3 if args.quick else 9
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"torch {torch.__version__}, {where}, median of {turns} turns")
    ways = ["none"] + ["compile"] * (not args.tiny) + (["graph"] if device.type == "cuda" else [])
    learning(device, turns, ways, ["mage_td3"] if args.quick else SCRIPTS)
    cleanrl_sizes(device, 300 if args.quick or args.tiny else 1000)
    if not args.quick:
        growth(device, turns)


if __name__ == "__main__":
    main()
