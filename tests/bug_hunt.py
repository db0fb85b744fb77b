"""A bug hunt: small mistakes that raise no error, and cost a paper's result. Can you find them by reading?

    python -m tests.bug_hunt                # the questions
    python -m tests.bug_hunt 1 mine.py      # a copy of a script with bug 1 in it, for you to read and repair
    python -m tests.bug_hunt --hint 1       # where to look
    python -m tests.bug_hunt --answer 1     # the lines that differ, and why it matters

With each copy comes the command that tells whether you have repaired it. A bug is a piece of code that stands
once in a script, and what stands there instead; tests/test_bug_hunt.py shows that the script still runs with
it, and that the tests see it.
"""

import argparse
import difflib
import io
import re
import textwrap
import tokenize
from dataclasses import dataclass
from pathlib import Path

from common.args import one_sentence

ROOT = Path(__file__).resolve().parent.parent
LOSSES, MAAC, BUFFER = (f"tests/{file}" for file in (
    "test_losses.py", "test_maac.py", "test_training.py -k buffer_stores"))  # what sees it  # fmt: skip


@dataclass
class Bug:
    script: str
    question: str
    hint: str
    before: str  # code that stands once in the script, whatever its line breaks and comments
    after: str  # what stands there with the bug
    why: str  # the answer, in words
    test: str  # the test of the suite that fails
    check: str = LOSSES


BUGS = [
    Bug(
        "td3",
        "The pole falls, the episode ends, and the critic does not mind: a fall is worth as much as balance. "
        "What does it still expect after the end?",
        "Look at the last line of td_target, and at the one argument that it does not use.",
        ".masked_fill(terminated, 0.0)",
        "",
        "After a terminal state nothing is paid, so the value of s' must not count there.",
        "test_td_target_takes_the_smaller_critic_and_stops_at_termination",
    ),
    Bug(
        "td3",
        "Pendulum-v1 pays at every step and never terminates, and yet the critic takes the 200th step of "
        "every episode for the last one there will ever be. Who told it so?",
        "Look at what an environment returns from a step, and at what the buffer is given.",
        "buffer.add(obs, action, reward, next_obs, terminated)",
        "buffer.add(obs, action, reward, next_obs, terminated or truncated)",
        "A time limit (truncated) ends an episode, but not the task: the state after it has a value.",
        "test_the_buffer_stores_what_happened[td3]",
        BUFFER,
    ),
    Bug(
        "td3",
        "The losses look healthy, and yet the critic is pulled to the mean of the batch's targets, in every "
        "state alike. How many TD errors does a batch of 256 states have?",
        "Subtract tensors of shapes (B,) and (N, B, 1) in your head. The critic says which shape it returns.",
        ".expand(self.members, -1, -1))[..., 0]",
        ".expand(self.members, -1, -1))",
        "Without the index the critic returns (N, B, 1), and by broadcasting every state's value is compared "
        "with every other state's target.",
        "test_critics_take_one_action_or_one_for_each_of_them",
    ),
    Bug(
        "td3",
        "A TD error gets smaller when the value comes to the target, and also when the target comes to the "
        "value. Which of the two happens here?",
        "Look at how `update` computes y: with which critic, and which gradient flows through it.",
        "with torch.no_grad():\n            y = td_target(actor_target, critic_target,",
        "y = td_target(actor_target, critic,",
        "The target is a constant, given by a slow copy. Here it comes from the critic that learns, and the "
        "gradient flows through it as well, so that the critic also changes the target to suit its value.",
        "test_targets_are_of_the_target_networks_and_hold_no_parameter_that_is_trained[td3]",
    ),
    Bug(
        "td3",
        "Once in a while the target is the value of an action that is far from what the actor would do. By "
        "how much may it be off, according to the paper?",
        "Find the noise of the target's action. Its standard deviation is a flag; it has a second one.",
        ".clamp(-args.noise_clip, args.noise_clip)",
        "",
        "The noise on the target's action is to be clipped to [-0.5, 0.5] (--noise-clip).",
        "test_targets_are_of_the_target_networks_and_hold_no_parameter_that_is_trained[td3]",
    ),
    Bug(
        "td3",
        "With --tau 0.005 the target networks should lag some two hundred updates behind. Print their "
        "distance to the trained ones: they hardly lag at all. Which way round is 0.005?",
        "Write out what lerp(target, source, weight) is for the weights 0 and 1.",
        "list(source.parameters()), tau)",
        "list(source.parameters()), 1 - tau)",
        "The target keeps 1 - tau of itself and takes tau of the source; here it is the other way round.",
        "test_polyak_moves_the_target_by_tau",
    ),
    Bug(
        "dyna_td3",
        "The statistics of the normaliser are off by a little, and the more so the shorter the episodes. "
        "Which states has it never seen, and which ones has it seen that are never acted in?",
        "It is shown one state at every step, in `train`.",
        "obs_norm.update(obs)",
        "obs_norm.update(next_obs)",
        "Networks act in obs. The first state of an episode is never a next_obs, and the last one always is.",
        "test_the_buffer_stores_what_happened[dyna_td3]",
        BUFFER,
    ),
    Bug(
        "dyna_td3",
        "The model's likelihood is as good as ever, but what it imagines has too little noise. A normal "
        "distribution has a mean, and what is N(0, 1) multiplied by?",
        "The model predicts a log-variance. Look at where it draws a sample.",
        "(logvar / 2).exp()",
        "logvar.exp()",
        "The noise is scaled by the standard deviation, exp(logvar / 2), and not by the variance.",
        "test_each_share_of_the_rows_goes_through_its_own_member",
    ),
    Bug(
        "mage_td3",
        "The gradient term of the loss is logged, and it is not small; yet with --lam 0 no weight of the "
        "critic ever moves. Of what is that term a function?",
        "A gradient that is part of a loss has to be differentiated again. What does autograd need for that?",
        "create_graph=create_graph)\n    return",
        "retain_graph=create_graph)\n    return",
        "retain_graph keeps the graph for another pass, but the gradient itself has none: it is a number, "
        "and no parameter can make it smaller. Only create_graph makes it a function of the parameters.",
        "test_mage_loss_is_the_naive_transcription[Pendulum-v1-2]",
    ),
    Bug(
        "mage_td3",
        "MAGE lives on the slope of what its model answers to an action; here it makes no difference to the "
        "gradient term how the model answers. Which part of the target's slope is missing?",
        "Follow the action through step_target: it changes the reward, and what else?",
        "model.sample(obs, action, model_noise)",
        "model.sample(obs, action, model_noise).detach()",
        "The action acts on the target through the next state. Detached, only the reward's slope remains.",
        "test_the_target_of_mage_is_differentiated_through_all_that_an_action_changes",
    ),
    Bug(
        "mage_td3",
        "The gradient term falls as it should, and the critic's slope is as wrong as a slope can be. How "
        "long is the sum of a vector and its opposite?",
        "Write down the gradient of δ = y - Q with respect to the action.",
        "grad_y - grad_q",
        "grad_y + grad_q",
        "∇δ = ∇y - ∇Q. With a plus the loss is smallest where the critic's slope is minus the target's.",
        "test_mage_loss_is_the_naive_transcription[Pendulum-v1-2]",
    ),
    Bug(
        "maac_sac",
        "At the ends of its range, where tanh is flat, the policy's action is hardly random any more, and "
        "yet it is praised for its entropy. Of which variable is that the entropy?",
        "u is Gaussian; the action is tanh(u). Look at what `sample` returns beside the action.",
        "(log_prob - log_slope)",
        "log_prob",
        "The density of tanh(u) is that of u, divided by the slope of tanh. Here it is the density of u.",
        "test_log_probability_is_that_of_the_squashed_gaussian",
    ),
    Bug(
        "maac_sac",
        "The target should be the smaller critic's, as a remedy against optimism. It is too pessimistic, and "
        "the more so the more members the ensemble has. The smallest of what does it take?",
        "The targets have the shape (H + 1, N, K, B). Count the axes.",
        "targets.min(1).values.mean(1)",
        "targets.min(2).values.mean(1)",
        "Axis 1 is that of the critics, whose minimum counts; axis 2 that of the members, whose mean does.",
        "test_the_smaller_critic_counts_on_each_trajectory",
    ),
    Bug(
        "maac_sac",
        "The critic chases a target that runs as fast as the critic itself. Which network was made to stand "
        "still?",
        "Compare what `update` gives to steve_targets with that function's own name for it.",
        "= steve_targets(actor, critic_target,",
        "= steve_targets(actor, critic,",
        "The targets come from the slow copy of the critic, critic_target.",
        "test_targets_are_of_the_target_critic_and_the_actor_follows_the_live_one",
        MAAC,
    ),
    Bug(
        "maac_sac",
        "As soon as the policy has less entropy than asked for, alpha falls to zero and exploration ends; "
        "while it has more, alpha grows. Which way is up?",
        "For the entropy -log π below its target: which sign does the loss's slope by alpha have?",
        "-(log_alpha.exp() *",
        "(log_alpha.exp() *",
        "The loss is -α (log π + target): its descent raises α while the entropy is below the target.",
        "test_temperature_rises_while_entropy_is_below_its_target",
    ),
]


def pattern(code):
    """A regular expression for a piece of code, whatever blanks, line breaks and comments it has."""
    skipped = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT)
    words = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            words += [token.string] if token.type not in skipped and token.string.strip() else []
    except tokenize.TokenError:
        pass  # a piece of code may leave brackets open
    return r"\s*(?:#[^\n]*\n\s*)*".join(map(re.escape, words))


def places(bug, source):
    """Where its code stands in the text of a script: [(first character, last character + 1)]."""
    return [match.span() for match in re.finditer(pattern(bug.before), source)]


def copy_with(bug):
    """The text of the script with the bug in it."""
    source = (ROOT / f"{bug.script}.py").read_text()
    (start, end), *others = places(bug, source) or [(0, 0)]
    if others or end == 0:
        raise ValueError(f"{bug.before!r} does not stand once in {bug.script}.py")
    return source[:start] + bug.after + source[end:]


def check(bug, path):
    return f"python -m pytest -q {bug.check} --script {path}"


def wrapped(text, indent="    "):
    return textwrap.fill(text, 100, initial_indent=indent, subsequent_indent=indent)


def difference(bug):
    """The lines that differ between the script and its copy."""
    sources = (ROOT / f"{bug.script}.py").read_text(), copy_with(bug)
    lines = difflib.unified_diff(*(x.splitlines() for x in sources), f"{bug.script}.py", "with the bug", n=1)
    return "\n".join(line.rstrip() for line in lines)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m tests.bug_hunt", description=__doc__.split("\n")[0])
    parser.add_argument("number", type=int, nargs="?", help=f"number of the bug, 1 to {len(BUGS)}")
    parser.add_argument("file", type=Path, nargs="?", help="new file that the copy with the bug goes into")
    parser.add_argument("--hint", action="store_true", help="say where to look")
    parser.add_argument("--answer", action="store_true", help="show the lines that differ, and why")
    args = parser.parse_args(argv)
    if args.number is None:
        for number, bug in enumerate(BUGS, 1):
            print(f"{number:2}  {bug.script}.py\n{wrapped(bug.question)}")
        print("\nTake one: python -m tests.bug_hunt 1 mine.py")
        return
    if not 1 <= args.number <= len(BUGS):
        parser.error(f"there is no bug {args.number}: give a number from 1 to {len(BUGS)}")
    bug = BUGS[args.number - 1]
    if args.hint or args.answer:
        print(wrapped(bug.hint, "") if args.hint else f"{difference(bug)}\n\n{wrapped(bug.why, '')}")
        return
    if args.file is None:
        parser.error(f"name a file for the copy: python -m tests.bug_hunt {args.number} mine.py")
    try:
        with open(args.file, "x") as file:
            file.write(copy_with(bug))
    except OSError as error:
        parser.error(f"{args.file} cannot be written ({error.strerror}): name a new file")
    print(f"{args.file} is {bug.script}.py with bug {args.number} in it.\n{wrapped(bug.question)}")
    print(f"Repair it, and see whether the tests agree:\n    {check(bug, args.file)}")


if __name__ == "__main__":
    with one_sentence():
        main()
