"""How many runs this machine has room for: cores, and GPUs that several runs share."""

import os
from pathlib import Path

import torch

from common import BadInput

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # in a container: microseconds it may use, and of how many
# Small networks leave a GPU idle much of the time, so a few runs share it well; but they take turns on it and
# each keeps some hundred MB there for CUDA alone, so many would only wait. Four is a guess, not measured.
RUNS_PER_GPU = 4


def cores():
    """How many cores this process may use: taskset, SLURM or a container may give it fewer than there are."""
    allowed = [getattr(os, "process_cpu_count", os.cpu_count)() or 1]  # Python 3.13 has the former
    allowed += [len(os.sched_getaffinity(0))] if hasattr(os, "sched_getaffinity") else []
    if share := os.environ.get("SLURM_CPUS_PER_TASK"):
        if not share.isdigit():
            raise BadInput(f"SLURM_CPUS_PER_TASK={share} is no number: unset it, or give --workers.")
        allowed.append(int(share))
    if CPU_MAX.exists() and (quota := CPU_MAX.read_text().split())[0] != "max":
        allowed.append(int(quota[0]) // int(quota[1]))
    return max(1, min(allowed))


def gpus(jobs):
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES has them; none if the runs do not use any."""
    used = torch.cuda.is_available() and any(job.settings["device"] != "cpu" for job in jobs)
    count = torch.cuda.device_count() if used else 0
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return names.split(",")[:count]


def at_a_time(jobs):
    """How many of these runs this machine has room for."""
    room = cores() // max((job.settings["threads"] for job in jobs), default=1)
    return max(1, min(room, RUNS_PER_GPU * len(gpus(jobs)) or room))
