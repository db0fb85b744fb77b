"""How long a run will take: one sentence as soon as that is known, and a warning before, where it is long."""

from common import say

WARM_UP = 10  # steps of learning before the clock starts: the first updates set up what the others use
LEAST = 5.0  # seconds of learning that are measured
SOON = 90.0  # a run that ends within so many seconds needs no sentence
MANY = 10_000  # updates from which on a CPU is warned of the paper's sizes
INSTEAD = "--preset laptop takes minutes, or with a model about an hour for a robot."


class Forecast:
    """Measures steps that learn, and says once how long the rest of the run will take.

    A model is trained in bursts, every --model-train-every steps, so the clock runs for whole periods of
    these. It stands still during an evaluation: each one to come counts as much as the last one took, or
    nothing where a run went on and has not evaluated yet.
    """

    def __init__(self, args, device, step):
        self.args, self.start = args, step
        self.on_cpu = args.preset == "paper" and device.type == "cpu"
        self.period = getattr(args, "model_train_every", 1)
        # What --accelerate puts around the training of the model works at its first burst.
        plain = args.accelerate == "none" or (args.accelerate == "auto" and device.type == "cpu")
        warm_up = WARM_UP if plain else max(WARM_UP, self.period)
        self.first = max(step, args.learning_starts) + warm_up  # the clock starts when this step ends
        self.began = self.paused = self.evaluation = 0.0
        self.told = False

    def warn(self):
        """Says before a run begins what the user may not have meant, such as the paper's sizes on a CPU."""
        for remark in getattr(self.args, "remarks", ()):  # of parse_args
            say(remark)
        total, first = self.args.total_timesteps, self.args.learning_starts
        if total <= first:
            say(f"--total-timesteps {total}: nothing is learned, as the first {first} steps are random "
                "(--learning-starts)")  # fmt: skip
        updates = (self.args.total_timesteps - self.args.learning_starts) * self.args.updates_per_step
        if self.on_cpu and self.start == 0 and updates >= MANY:
            say(f"--preset paper has the sizes of the paper: a CPU may need hours or days. {INSTEAD}")

    def evaluated(self, seconds):
        """An evaluation has just taken so long."""
        self.evaluation = seconds
        self.paused += seconds

    def after(self, step, now):
        """To be called when a step ends, at the time `now` in seconds. It says the sentence, once."""
        now -= self.paused
        if step == self.first:
            self.began = now
        measured, left = step - self.first, self.args.total_timesteps - step
        if self.told or measured <= 0 or measured % self.period or now - self.began < LEAST:
            return
        self.told = True
        evaluations = self.args.total_timesteps // self.args.eval_every - step // self.args.eval_every
        seconds = left * (now - self.began) / measured + evaluations * self.evaluation
        if seconds >= SOON:
            end = f" (--preset paper on a CPU); {INSTEAD}" if self.on_cpu else "."
            pace = f"at {short(left / seconds)} steps a second the remaining {left:,} steps"
            say(f"step {step}: {pace} take {duration(seconds)}{end}")


def duration(seconds):
    """A time in the unit that suits it."""
    units = [("minutes", 60), ("hours", 3600), ("days", 24 * 3600)]
    name, unit = [units[0], *(pair for pair in units[1:] if seconds >= 1.8 * pair[1])][-1]
    return f"about {short(seconds / unit)} {name}"


def short(number):
    """A number with two digits that count."""
    return f"{float(f'{number:.2g}'):,g}"
