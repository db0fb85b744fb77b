"""Dyna-TD3 (D'Oro & Jaskowski 2020, section 4): TD3 whose critic learns from imagined transitions.

An ensemble of Gaussian networks learns p(s'|s, a) from the transitions that the environment gave. In replayed
states the current actor acts and the ensemble answers, and ten times for each step in the environment the
critic learns from such answers. This is the one baseline of the MAGE paper that has a model: mage_td3.py
makes the same data, and asks its critic for the slope of the target as well.

Equations, with the numbers of that paper. ε ~ N(0, 0.2²) is clipped to [-0.5, 0.5], and π̄(ŝ) + ε to [-1, 1].
ξ ~ N(0, 1), and Δ = (s' - s - m) / c is the normalised change of the state, where m and c are the mean and
the standard deviation of such changes:
    minimise (Δ - μₖ(s, a))² / σₖ(s, a)² + log σₖ²   trains member k (Eq. 9, D.2)           model_loss
    ŝ = s + m + c (μₖ(s, a) + σₖ(s, a) ξ), a = π(s)  is imagined, k at random (D.2)         sample
    y = r + γ (1 - terminated) minᵢ Q̄ᵢ(ŝ, π̄(ŝ) + ε)  is the target (Algorithm 2)            td_target
    minimise Huber(y - Qᵢ(s, a)), mean over i        trains the critics (Eq. 3)             td_loss
    maximise minᵢ Qᵢ(s, π(s))                        trains the actor (Eq. 4, Algorithm 2)  actor_loss
    Q̄ ← τ Q + (1 - τ) Q̄, and so for π̄                moves Q̄ and π̄ (Algorithm 2)           polyak

In the paper, and in this file:
    s, a, r, s' (ŝ imagined)  obs, action, reward, next_obs    p_ω, r̂  model, reward_model
    π_θ, Q_φ                  actor, critic                    d       --policy-delay
    π̄, Q̄ (a bar)              actor_target, critic_target      σ, σ̄    --exploration-noise, --target-noise
    𝓑                         buffer                           τ       --tau; the 0.995 of D.2 is 1 - τ

Shapes: B is the batch, ds the dimension of an observation, da that of an action, N the number of critics,
K that of the members of the ensemble, M the rows of a batch for one of them; n is any number of rows.

Read td3.py first. These blocks differ: the section "model" (`Dynamics`, `RewardModel`), `model_loss` and
`train_model`, which is one gradient step of the ensemble, are new; after every 25 steps the loop calls
`train_model` 120 times; and `update` imagines its batch where td3.py replays one. A step has ten updates here
and one in td3.py, so compare with `td3.py --updates-per-step 10`.

Differences. In places this file departs from TD3 as it is usually written, from the MAGE paper, or from the
code that was published with it (github.com/nnaisense/MAGE, "theirs" below). A mark says whom the file follows
there: [paper] is the MAGE paper, where it departs from TD3; [authors' code] is their code, where the paper is
silent or says something else; [ours] is neither.

Of actor and critic:
- [paper] A batch has 1024 rows, the optimiser is RAdam with a learning rate of 1e-4, the critic's loss is a
  Huber loss, and learning starts after 1000 steps (D.2). With the paper preset, a batch has 512 rows on the
  pendulum and the cart-pole, learning starts after 100 steps, the actor's layers have 128 units, and the
  model has two layers of 128.
- [authors' code] The Huber loss has the threshold 1, of which the paper says nothing. TD3 as it is usually
  written squares all errors, as --huber-threshold 1000 does. With them td3.py with ten updates learns far
  more on HalfCheetah, as much as this script, which gains nothing from them (tests/reference/README.md).
- [authors' code] Actor and critic have swish units; D.2 names these for the model and the learned reward
  only.
- [authors' code] The loss is a mean over the critics, where Algorithm 2 has a loss for each, so that with two
  of them each gets half the gradient. Clipping sees this factor, and so do RAdam's first five steps.
- [paper] The actor climbs minᵢ Qᵢ and not Q₁, the critics' targets move at every update, and only the actor
  and its target wait for every second one (Algorithm 2).
- [authors' code] The actor has two layers of 384 units; the 284 of D.2 is taken for a slip. Actor and critic
  see normalised observations and raw actions, and every entry of a gradient is clipped to [-5, 5], the
  model's too, of which the paper says nothing.
- [authors' code] The noise ε is on the target actor's action, as in Fujimoto et al. 2018; Algorithm 2 prints
  it in the action that is rewarded. The target actor's action with ε, and the actor's with exploration noise,
  are clipped to [-1, 1], where actions lie, and Algorithm 2 prints neither of these clips.
- [authors' code] The target has the factor 1 - terminated, since nothing is earned after a terminal state. No
  equation of the paper prints it.
- [ours] The environments are Gymnasium's, v4 of the robots and Pendulum-v1, where the paper has v2 and
  Pendulum-v0. On Pendulum-v0 the angle follows the speed as it is before its bounds are applied.
- [ours] The buffer keeps the last 1,000,000 transitions, since a run has 100,000 steps unless you ask for
  more. Theirs has room for the whole run, which is the same up to a million steps; for the three million
  steps of B.5 give --buffer-size 3000000.
- [ours] The first update follows step 1001 (--learning-starts + 1), the first step whose action the actor
  chooses. Theirs follows step 1000, so that theirs is ten updates ahead.
- [ours] A run ends with a message as soon as a number is not finite, so that a failure cannot pass for a
  result. Theirs puts a new agent in the place of one whose TD loss is above 100 or whose actor's loss is
  beyond 1e5, notes it in its log, and goes on with the old model and buffer.

Of the model:
- [paper] The model is trained after every 25 steps (D.2), where section 4.1 says after each step.
- [authors' code] The model's inputs and what it predicts, s' - s, are normalised, and a sigmoid keeps its
  log-variance between -5 and -1. The paper says only that it predicts the difference (D.2).
- [authors' code] The weight decay of 1e-4 (D.2), which the learned reward has too, is decoupled. With the
  learning rate of 1e-4 it does nothing, there and here: it multiplies a weight by 1 - 1e-8, which is 1 in
  float32. With the 1e-3 that the laptop preset has for the pendulum and the cart-pole it is
  1 - 1.2e-7, which does act, but takes 0.2% in the 14,400 batches of its 3000 steps.
- [ours] Each member imagines an equal share of the batch. As the rows are drawn independently, this is as
  good as theirs, a random member for each row, and costs one K-th of it.
- [ours] A fit is 120 batches, as D.2 has it, drawn with replacement, so that a step costs the same throughout
  a run. Theirs runs whole epochs until it has 120 batches or more, and with many transitions one epoch is far
  more: 390 batches with 100,000, and 11,718 with the three million of B.5.
- [ours] Normalisers follow every step, since the one for observations serves the actor and the critic as well
  as the model. Theirs do so for actor and critic, while the model and the learned reward keep those of their
  last fit until the next one, 25 steps later.
- [ours] The last layer of the model, as all layers, begins with uniform Xavier weights. In theirs the last
  layers of the model and of the learned reward have normal ones, of the same variance.
- [ours] A dimension that varies by no more than the rounding of float32 explains is taken for constant and
  predicted to stay as it is. Theirs gives a std below 1e-6 the scale 1, so that the model adds noise of 0.08
  to 0.61, in whatever unit the dimension has, to something that never moves.

Of the reward:
- [ours] Rewards are those that the simulator pays. Theirs are computed from actions in [-1, 1] even where the
  simulator gets larger ones (Pusher: a quarter of the true cost of an action), and on imagined batches they
  mix rows: Swimmer's cost is summed over the batch, and Pendulum takes the torque of its first row for all.
- [ours] The learned reward (B.2) sees s, a and s' normalised, learns from the first member's batches, and its
  error counts in standard deviations of the reward, so that no unit of the reward is special to the
  optimiser. Theirs sees the raw action and, by a slip, s normalised a second time in the place of s'; it has
  epochs of its own, and its error counts in the unit of the reward.

This run takes 3 to 4 minutes. Four seeds of five ended with returns between -143 and -108, and one at -701:

python dyna_td3.py --env-id Pendulum-v1 --preset laptop

Try this:
- Look at the last line of eval.csv. In five such runs ∇ₐQ was 2.4 to 7.2 long (`gradient_norm`) where the
  truth was 0.054 to 0.19 (`true_norm`), and yet four of the five policies are good: in one dimension the sign
  is enough.
- Give `--env-id ContinuousCartPole-v1`. Three seeds end after 10, 9 and 9 steps of 500: the critic is only
  ever asked about the actor's own action, so once the actor pushes with all its force nothing tells what less
  would be worth.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from gymnasium.wrappers import RecordEpisodeStatistics
from torch import nn

from common import BadInput
from common.acceleration import accelerate
from common.args import main, prepare
from common.dynamics import dynamics_fn
from common.envs import ReplayableEnv, make_env
from common.evaluate import as_policy, load_networks
from common.rewards import reward_fn, termination_fn
from common.run import Run


@dataclass
class Args:
    """With --preset laptop a run takes this long on a busy core, and its last evaluation returns:

    - Pendulum-v1, 3,000 steps: 3 to 4 minutes, -701 to -108 (5 seeds)
    - HalfCheetah-v4, 10,000 steps: 41 to 89 minutes, 1554 to 2228 (3 seeds)
      with --accelerate compile
    - Pusher-v4, 10,000 steps: 66 to 92 minutes, -83 to -42 (3 seeds)

    Four seeds of the pendulum end above -150. The paper preset takes a core about a day and a half on
    HalfCheetah-v4. What it returns after its 100,000 steps is not known, as no such run has been taken to its
    end.
    """

    # --- run ---
    env_id: str = "HalfCheetah-v4"  # This names the environment; the README lists what works.
    seed: int = 0  # This seeds everything random.
    total_timesteps: int = 100_000  # The run has this many environment steps, random ones included.
    preset: Literal["paper", "laptop"] = "paper"  # It sets the authors' values, or cheaper ones for one core.
    device: str = "auto"  # Give cpu, cuda, or cuda:1 for the second GPU; auto takes the GPU if there is one.
    threads: int = 1  # PyTorch uses this many CPU threads; small networks are fastest on one.
    # On a GPU `graph` replays the updates as CUDA graphs, and `compile` puts them through torch.compile
    # first, which takes a minute at the start and is faster still. A CPU has no graphs, so that `auto` means
    # `graph` on a GPU and `none` on a CPU.
    accelerate: Literal["none", "auto", "compile", "graph"] = "auto"
    exp_name: str | None = None  # This is the second level of the run folder, by default the script's name.
    run_dir: str | None = None  # This is the run folder, by default runs/<env-id>/<exp-name>/seed-<seed>.
    resume: bool = False  # The run in that folder goes on from its last checkpoint, with its own settings.
    checkpoint_every: float = 600.0  # A checkpoint is saved whenever this many seconds have passed.
    eval_every: int = 1000  # The policy is evaluated after every so many environment steps.
    eval_episodes: int = 10  # This is the number of episodes in an evaluation; with 0 there is none.
    eval_max_steps: int = 10_000  # An episode of an evaluation is cut after this many steps.
    # --- data ---
    learning_starts: int = 1000  # Actions are random for this many steps before actor and critic learn.
    buffer_size: int = 1_000_000  # The replay buffer keeps this many of the newest transitions.
    exploration_noise: float = 0.1  # The actor's action in [-1, 1] gets noise of this standard deviation.
    # --- actor and critic ---
    updates_per_step: int = 10  # The critic is updated this many times after each environment step.
    batch_size: int = 1024  # An update looks at this many states.
    gamma: float = 0.99  # This is the discount factor.
    tau: float = 0.005  # Target networks move this share of the way; the paper's "decay 0.995" is 1 - tau.
    lr: float = 1e-4  # This is the learning rate of actor and critic.
    actor_hidden: int = 384  # Each of the actor's two hidden layers has this many units.
    critic_hidden: int = 384  # Each of a critic's two hidden layers has this many units.
    num_critics: int = 2  # There are this many critics, and the smallest of their values counts.
    layer_norm: bool = False  # Layer normalisation in the critics keeps their values from running away.
    huber_threshold: float = 1.0  # TD errors up to this size count by their squares, larger ones linearly.
    policy_delay: int = 2  # The actor is updated once in this many updates of the critic.
    target_noise: float = 0.2  # The target actor's action gets noise of this standard deviation.
    noise_clip: float = 0.5  # The noise on the target's action is clipped to this size.
    # --- model ---
    ensemble_size: int = 8  # The model has this many members, and one of them answers for each imagined row.
    model_hidden: int = 512  # Each hidden layer of the model has this many units.
    model_layers: int = 4  # The model has this many hidden layers.
    model_lr: float = 1e-4  # This is the learning rate of the model and of the learned reward.
    model_train_every: int = 25  # The model is trained after every so many environment steps.
    model_batches: int = 120  # This many gradient steps are taken each time, every member on its own batches.
    learned_reward: bool = False  # The reward is learned too (B.2); the termination function stays known.
    reward_hidden: int = 256  # Each hidden layer of the learned reward has this many units.
    reward_layers: int = 3  # The learned reward has this many hidden layers.
    oracle_dynamics: bool = False  # True dynamics, where known and differentiable, replace the model.


# The paper has smaller settings for the two tasks of classic control, the pendulum and the cart-pole.
PAPER_CLASSIC = dict(learning_starts=100, batch_size=512, actor_hidden=128, model_hidden=128, model_layers=2,
                     reward_hidden=128, reward_layers=1)
# The laptop preset is ours: it keeps the algorithm, and takes smaller networks and batches and fewer steps,
# so that one core needs minutes for classic control and about an hour for a robot. On the pendulum and the
# cart-pole its learning rates are ten times the paper's, and learning starts after 1000 steps and not after
# 100.
LAPTOP = dict(total_timesteps=10_000, eval_every=250, batch_size=256, actor_hidden=256, critic_hidden=256,
              model_hidden=256)
LAPTOP_CLASSIC = LAPTOP | dict(total_timesteps=3000, lr=1e-3, actor_hidden=64, critic_hidden=128,
    model_lr=1e-3, model_hidden=128, model_layers=2, reward_hidden=128, reward_layers=1)  # fmt: skip
PRESETS = {  # --preset: {environment, or "*" for any other: what differs from the defaults above}
    "paper": {"*": {}, "Pendulum-v1": PAPER_CLASSIC, "ContinuousCartPole-v1": PAPER_CLASSIC},
    "laptop": {"*": LAPTOP, "Pendulum-v1": LAPTOP_CLASSIC, "ContinuousCartPole-v1": LAPTOP_CLASSIC},
}
MODEL_BATCH, MODEL_DECAY = 256, 1e-4  # rows per member and gradient step; weight decay (D.2)
LOGVAR = (-5.0, -1.0)  # bounds on the model's log-variance (authors' code): a std of 0.08 to 0.61


# --- networks -----------------------------------------------------------------------------------------------
class Normaliser(nn.Module):
    """Running mean and standard deviation of the rows (dim,) it saw, saved with the networks that use it."""
    def __init__(self, dim):
        super().__init__()
        # The moments are three statistics in one float64 tensor: the number of rows, their mean, and the sum
        # of their squared deviations from it. The networks read mean, std and scale, which follow from them
        # and are kept in float32; scale is std, but 1 where a dimension is constant.
        self.register_buffer("moments", torch.zeros(1 + 2 * dim, dtype=torch.float64))
        for name, start in dict(mean=0.0, std=1.0, scale=1.0).items():
            self.register_buffer(name, torch.full((dim,), start))

    def update(self, x, whole=None):
        """Adds a row x (dim,) to the statistics. If x is a change s' - s, `whole` is the normaliser of s."""
        # This is Welford's algorithm. It needs float64, as float32 loses a small square beside a million
        # others. Everything is changed in place, because a CUDA graph goes on reading the memory that it has
        # seen.
        x = torch.as_tensor(x, device=self.mean.device)
        count, (mean, squares) = self.moments[0], self.moments[1:].view(2, -1)
        count += 1
        deviation = x - mean
        mean += deviation / count
        squares += deviation * (x - mean)
        self.mean.copy_(mean)
        self.std.copy_((squares / count).sqrt())
        # float32 keeps a number to a ten-millionth of its size or so. A dimension is therefore taken for
        # constant if its standard deviation is at most the sum of a millionth of the mean's size and a
        # hundred-thousandth of the standard deviation, both of the quantity that is stored, as this much may
        # be rounding. For a change s' - s the stored quantity is s.
        rounding = 1e-5 * (whole or self).std + 1e-6 * (whole or self).mean.abs()
        self.scale.copy_(self.std.masked_fill(self.std <= rounding, 1.0))

    def forward(self, x):  # (..., dim) -> (..., dim)
        # A constant dimension has the scale 1, so that it is shifted and not divided by next to nothing.
        return (x - self.mean) / self.scale

    def inverse(self, x):  # (..., dim) -> (..., dim)
        # Here a constant dimension has its own small std, so that a model gives it next to no noise.
        return x * self.std + self.mean


class EnsembleLinear(nn.Module):
    """`members` linear layers in one batched product: (members, rows, in) -> (members, rows, out)."""
    def __init__(self, members, dim_in, dim_out):
        super().__init__()
        weights = [nn.init.xavier_uniform_(torch.empty(dim_in, dim_out)) for _ in range(members)]
        self.weight = nn.Parameter(torch.stack(weights))
        self.bias = nn.Parameter(torch.zeros(members, 1, dim_out))

    def forward(self, x):
        # A product with a single column is three times slower on a CPU than the sum that it stands for.
        if self.weight.shape[-1] == 1:
            return self.bias + (x * self.weight.mT).sum(-1, keepdim=True)
        return torch.baddbmm(self.bias, x, self.weight)


def mlp(members, dim_in, hidden, layers, dim_out, layer_norm=False):
    """`members` networks of `layers` swish layers: (members, rows, dim_in) -> (members, rows, dim_out)."""
    # No activation follows the last layer. The swish units before it are smooth, so that the derivatives that
    # MAGE and MAAC take through a network change without jumps. With layer_norm, what enters a swish layer is
    # normalised over its units, so that no input, however far from the data, can make the output grow. It has
    # no parameters, so that one such module may serve all layers and members.
    widths = [dim_in] + [hidden] * layers
    norm = [nn.LayerNorm(hidden, elementwise_affine=False)] * layer_norm
    stack = [m for i, o in pairwise(widths) for m in (EnsembleLinear(members, i, o), *norm, nn.SiLU())]
    return nn.Sequential(*stack, EnsembleLinear(members, widths[-1], dim_out))


class Actor(nn.Module):
    """Deterministic policy pi(s): (B, ds) -> (B, da) in [-1, 1]."""
    def __init__(self, obs_norm, action_dim, hidden):
        super().__init__()
        self.obs_norm = obs_norm
        # The actor is an ensemble of one, so that it needs no layers of a kind of its own.
        self.net = mlp(1, len(obs_norm.mean), hidden, 2, action_dim)

    def forward(self, obs):
        return self.net(self.obs_norm(obs)[None])[0].tanh()


class Critic(nn.Module):
    """Q_1 ... Q_N(s, a): (B, ds) with (B, da), or with an action per critic (N, B, da) -> (N, B)."""
    def __init__(self, obs_norm, action_dim, hidden, members, layer_norm=False):
        super().__init__()
        self.obs_norm, self.members = obs_norm, members
        self.net = mlp(members, len(obs_norm.mean) + action_dim, hidden, 2, 1, layer_norm)

    def forward(self, obs, action):
        # All critics see the same state. They may be asked about an action each, or about the same one.
        obs = self.obs_norm(obs).expand(*action.shape[:-1], -1)
        return self.net(torch.cat([obs, action], -1).expand(self.members, -1, -1))[..., 0]


# --- model --------------------------------------------------------------------------------------------------
class Dynamics(nn.Module):
    """p(s' | s, a) as K Gaussians over the normalised change s' - s."""
    def __init__(self, obs_norm, action_dim, hidden, layers, members):
        super().__init__()
        obs_dim = len(obs_norm.mean)
        self.obs_norm, self.action_norm = obs_norm, Normaliser(action_dim)
        self.delta_norm, self.members = Normaliser(obs_dim), members
        self.net = mlp(members, obs_dim + action_dim, hidden, layers, 2 * obs_dim)

    def forward(self, obs, action):  # (K, n, ds), (K, n, da) -> mean, log-variance (K, n, ds)
        # The sigmoid keeps the log-variance within its bounds, smoothly, so that the likelihood stays finite.
        mean, raw = self.net(torch.cat([self.obs_norm(obs), self.action_norm(action)], -1)).chunk(2, -1)
        return mean, LOGVAR[0] + (LOGVAR[1] - LOGVAR[0]) * raw.sigmoid()

    def sample(self, obs, action, noise):  # (n, ds), (n, da), standard normal (n, ds) -> next_obs (n, ds)
        # The k-th of K equal shares of the rows goes through member k, so n must be a multiple of K. With
        # rows in random order this is as good as drawing a member for each row, and it costs one K-th of
        # asking every member about every row.
        obs_k, action_k, noise_k = (x.unflatten(0, (self.members, -1)) for x in (obs, action, noise))
        mean, logvar = self(obs_k, action_k)  # (K, n/K, ds)
        # The noise ξ comes from outside (the reparameterisation trick), so that the sample can be
        # differentiated with respect to s and a. μₖ and σₖ are of the normalised change, and `inverse` brings
        # μₖ(s, a) + σₖ(s, a) ξ back to the units of the environment, where ŝ is s and this change.
        delta = mean + (logvar / 2).exp() * noise_k  # (K, n/K, ds)
        return obs + self.delta_norm.inverse(delta.flatten(0, 1))


class RewardModel(nn.Module):
    """Learned reward r(s, a, s'): (B, ds), (B, da), (B, ds) -> (B,)   (B.2)."""
    def __init__(self, obs_norm, action_norm, hidden, layers):
        super().__init__()
        self.obs_norm, self.action_norm, self.reward_norm = obs_norm, action_norm, Normaliser(1)
        self.net = mlp(1, 2 * len(obs_norm.mean) + len(action_norm.mean), hidden, layers, 1)

    def forward(self, obs, action, next_obs):
        # The network predicts the reward in its own standard deviations, and `inverse` gives it its unit
        # back.
        x = torch.cat([self.obs_norm(obs), self.action_norm(action), self.obs_norm(next_obs)], -1)
        return self.reward_norm.inverse(self.net(x[None])[0])[:, 0]


# --- replay buffer ------------------------------------------------------------------------------------------
class ReplayBuffer:
    """The last `capacity` transitions, one row (s, a, r, s', terminated) each, on the device."""
    def __init__(self, capacity, obs_dim, action_dim, device):
        self.widths = [obs_dim, action_dim, 1, obs_dim, 1]
        self.rows = torch.zeros(capacity, sum(self.widths), device=device)
        self.added = 0
        # The number of rows lives on the device as well, so that drawing from them never waits for the
        # device.
        self.size = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, obs, action, reward, next_obs, terminated):
        # Truncation is not stored: a time limit ends an episode, but the state after it keeps its value.
        row = np.hstack([obs, action, reward, next_obs, terminated]).astype(np.float32)
        self.rows[self.added % len(self.rows)] = torch.from_numpy(row)
        self.added += 1
        self.size.fill_(min(self.added, len(self.rows)))

    def sample(self, *shape):  # uniform with replacement -> (*shape, ds), (*shape, da), (*shape,), ...
        # `randint` wants its bound as a Python number, and ours is on the device. A huge random number modulo
        # the size is uniform too: its bias is at most size / 2^62.
        index = torch.randint(1 << 62, shape, device=self.rows.device) % self.size
        obs, action, reward, next_obs, terminated = self.rows[index].split(self.widths, -1)
        return obs, action, reward[..., 0], next_obs, terminated[..., 0] > 0

    def state_dict(self):
        return {"rows": self.rows[: self.added].to("cpu", copy=True), "added": self.added}

    def load_state_dict(self, state):
        self.rows[: len(state["rows"])] = state["rows"]
        self.added = state["added"]
        self.size.fill_(len(state["rows"]))


# --- losses -------------------------------------------------------------------------------------------------
def huber(x, threshold=1.0):
    """Mean of the Huber loss: half the square up to the threshold, and a straight line beyond it."""
    # The square finds the mean of what it is to predict, and the straight line the median. So if most targets
    # agree and a few are far off, as where an episode ends, the straight line leaves these few unexplained.
    return nn.functional.huber_loss(x, torch.zeros_like(x), delta=threshold)


def model_loss(model, obs, action, next_obs):
    """The model's loss and its mean squared error, two scalars   (Eq. 9, D.2).

    The loss is twice the negative log-likelihood without constants, and a mean over the ds dimensions where a
    likelihood has their sum. obs and next_obs are (K, M, ds), action is (K, M, da).
    """
    # The model predicts the change of the state, in standard deviations of such changes.
    target = model.delta_norm(next_obs - obs)  # (K, M, ds): M rows for each member
    mean, logvar = model(obs, action)  # (K, M, ds)
    # (Δ - μₖ)² / σₖ² + log σₖ²   (Eq. 9, for the Gaussian members of D.2)
    square = (mean - target) ** 2
    return (square * (-logvar).exp() + logvar).mean(), square.detach().mean()


def td_target(actor_target, critic_target, reward, next_obs, terminated, noise, gamma):
    """y = r + gamma (1 - terminated) min_i Q_i(s', clip(pi(s') + noise)) of the target networks -> (B,)."""
    # An actor seeks out the actions that its critic overrates, so the smaller of the target critics counts.
    # The noise spreads the target over actions near π̄(s'), so that a narrow peak of Q̄ does not decide it. A
    # terminal state is worth nothing, while a state in which a time limit cuts the episode keeps its value.
    next_action = (actor_target(next_obs) + noise).clamp(-1, 1)  # (B, da)
    next_q = critic_target(next_obs, next_action).min(0).values  # (B,)
    # y = r + γ (1 - terminated) minᵢ Q̄ᵢ(s', clip(π̄(s') + ε))   (Algorithm 2, see the header)
    return reward + gamma * next_q.masked_fill(terminated, 0.0)  # (B,)


def td_loss(critic, obs, action, y, threshold=1.0):
    """Huber loss of the TD error, a scalar, for obs (B, ds), action (B, da) and y (B,)   (Eq. 3)."""
    # δᵢ = y - Qᵢ(s, a), a row for each critic. The target y is a constant here.   (Eq. 3)
    return huber(y - critic(obs, action), threshold)  # of (N, B)


def actor_loss(actor, critic, obs):
    """-min_i Q_i(s, pi(s)), a mean over obs (B, ds)   (Algorithm 2; the TD3 paper takes Q_1)."""
    # The actor climbs minᵢ Qᵢ(s, π(s))   (Eq. 4, with the minimum of Algorithm 2). The gradient reaches it
    # through the action alone, as in ∇θ J ∝ E[∇ₐQ ∇θ π]   (Eq. 1), so that the slope of a critic matters more
    # to its actor than its value does. In Eq. 1 Q is the true value, and s is drawn from where the policy
    # goes; here, as in Algorithm 2, Q is the critic and s comes from the buffer.
    return -critic(obs, actor(obs)).min(0).values.mean()


# --- optimisation -------------------------------------------------------------------------------------------
def radam(module, lr, weight_decay=0.0):
    """RAdam, with decoupled weight decay: it shrinks the weights, and adds nothing to the gradient."""
    return torch.optim.RAdam(module.parameters(), lr, weight_decay=weight_decay, decoupled_weight_decay=True,
                             foreach=True)


def descend(optimizer, loss):
    """One step of the optimiser's parameters alone; returns the norm of their gradient before clipping."""
    # A loss may reach networks that are not to be trained by it, such as the critic in the actor's loss.
    # `inputs` keeps the gradient from being stored in any of them.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
    # [authors' code] Every entry of the gradient is clipped to [-5, 5], for all networks.
    nn.utils.clip_grad_value_(parameters, 5.0, foreach=True)
    optimizer.step()
    return norm


@torch.no_grad()
def polyak(target, source, tau):
    """target <- (1 - tau) target + tau source."""
    # Q̄ ← τ Q + (1 - τ) Q̄, for all parameters in one call.
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


# --- training -----------------------------------------------------------------------------------------------
def networks(args, obs_dim, action_dim):
    """{name: network}: actor and critic, their targets, the model and the learned reward."""
    # One normaliser of observations serves all networks, so that the targets see what the trained ones see.
    obs_norm, critic_args = Normaliser(obs_dim), (args.critic_hidden, args.num_critics, args.layer_norm)
    actor, actor_target = (Actor(obs_norm, action_dim, args.actor_hidden) for _ in range(2))
    critic, critic_target = (Critic(obs_norm, action_dim, *critic_args) for _ in range(2))
    # The targets begin as copies, and are moved by `polyak` alone: no optimiser has their parameters.
    for target, source in ((actor_target, actor), (critic_target, critic)):
        target.requires_grad_(False).load_state_dict(source.state_dict())
    model = Dynamics(obs_norm, action_dim, args.model_hidden, args.model_layers, args.ensemble_size)
    reward_model = RewardModel(obs_norm, model.action_norm, args.reward_hidden, args.reward_layers)
    return dict(actor=actor, actor_target=actor_target, critic=critic, critic_target=critic_target,
                model=model, reward_model=reward_model)  # fmt: skip


def load_policy(run_dir, plan=False):
    """The policy of a run, without exploration noise: float32 arrays (n, ds) -> (n, da)."""
    if plan:
        raise BadInput("--plan is for algorithms that plan with their model: leave it out for this one.")
    return as_policy(load_networks(run_dir, Args, networks, only=["actor"])[1]["actor"])


def train(args: Args) -> float:
    """Trains one agent in one run folder; returns the mean return of its last evaluation."""
    device = prepare(args)
    env = ReplayableEnv(RecordEpisodeStatistics(make_env(args.env_id, args.seed)))
    env.reset()
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    nets = {name: net.to(device) for name, net in networks(args, obs_dim, action_dim).items()}
    actor, actor_target, critic, critic_target, model, reward_model = nets.values()
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    actor_opt, critic_opt = radam(actor, args.lr), radam(critic, args.lr)
    model_opt, reward_opt = (radam(m, args.model_lr, MODEL_DECAY) for m in (model, reward_model))

    # What answers in the place of the environment: reward and termination are known functions, unless the
    # reward is to be learned, and the next state is the model's, unless the true dynamics are asked for.
    reward_of = reward_model if args.learned_reward else reward_fn(args.env_id)
    terminated_at = termination_fn(args.env_id)
    oracle = dynamics_fn(args.env_id) if args.oracle_dynamics else None

    def train_model():
        """One step of every member on a batch of its own, and of the reward model if it is learned."""
        obs, action, reward, next_obs, _ = buffer.sample(args.ensemble_size, MODEL_BATCH)  # (K, M, ds), ...
        loss, error = model_loss(model, obs, action, next_obs)
        log = dict(model_loss=loss, model_error=error, model_grad=descend(model_opt, loss))
        if args.learned_reward:
            # One network learns the reward, from the batch that the first member has.
            error = reward_model(obs[0], action[0], next_obs[0]) - reward[0]  # (M,)
            loss = (error / reward_model.reward_norm.scale).square().mean()
            log |= dict(reward_loss=loss, reward_grad=descend(reward_opt, loss))
        return log

    def update(with_actor):
        """One update of the critics on new imagined transitions and, with_actor, one of the actor."""
        # Only the states of the replayed transitions are used: in each of them the current actor chooses an
        # action, and the model answers it.
        obs = buffer.sample(args.batch_size)[0]  # (B, ds)
        with torch.no_grad():
            action = actor(obs)  # (B, da)
        # The noise does not depend on the action, so that ŝ and y are functions of the action that MAGE can
        # differentiate (the reparameterisation trick, Appendix C). It is drawn here and not inside
        # `step_target`, which therefore gives the same y whenever it is given the same action.
        model_noise = torch.randn_like(obs)
        target_noise = (args.target_noise * torch.randn_like(action)).clamp(-args.noise_clip, args.noise_clip)

        def step_target(action):
            # ŝ ~ p_ω(· | s, a), and then r(s, a, ŝ) and y, all of them functions of the action.
            imagined = oracle(obs, action) if oracle else model.sample(obs, action, model_noise)
            reward, terminated = reward_of(obs, action, imagined), terminated_at(imagined)
            return td_target(actor_target, critic_target, reward, imagined, terminated, target_noise,
                             args.gamma)  # fmt: skip

        with torch.no_grad():
            y = step_target(action)
        critic_loss = td_loss(critic, obs, action, y, args.huber_threshold)
        log = dict(td_loss=critic_loss, critic_grad=descend(critic_opt, critic_loss))
        # [paper] The critics' targets move at every update; the actor and its target wait (--policy-delay).
        polyak(critic_target, critic, args.tau)
        if with_actor:
            loss = actor_loss(actor, critic, obs)
            log |= dict(actor_loss=loss, actor_grad=descend(actor_opt, loss))
            polyak(actor_target, actor, args.tau)
        return log

    how = (args.accelerate, device, [actor_opt, critic_opt, model_opt, reward_opt])
    train_model, update = accelerate(train_model, *how), accelerate(update, *how)
    # This and the random state, which Run saves, are everything that changes during a run. A checkpoint has
    # the state of each part, so that a stopped run goes on bit for bit.
    state = dict(env=env, buffer=buffer, **nets, actor_opt=actor_opt, critic_opt=critic_opt,
                 model_opt=model_opt, reward_opt=reward_opt)
    with Run(args, __file__, state, device) as run:
        if run.step == 0:
            run.evaluate(actor, critic)
        for step in run.steps():
            # --- act ---
            # The first actions are uniform random ones, as nothing has been learned yet.
            obs = env.obs
            if step <= args.learning_starts:
                action = torch.empty(action_dim, device=device).uniform_(-1, 1)
            else:
                action = actor(torch.as_tensor(obs[None], device=device))[0]
                action = (action + args.exploration_noise * torch.randn_like(action)).clamp(-1, 1)
            # On a GPU every transfer makes the CPU wait, so one transfer brings the action together with all
            # numbers that were recorded since the last one. If one of them is not finite, the run ends.
            action = run.fetch(action)
            next_obs, reward, terminated, truncated, info = env.step(action)
            # --- store ---
            buffer.add(obs, action, reward, next_obs, terminated)
            actor.obs_norm.update(obs)
            model.action_norm.update(action)
            reward_model.reward_norm.update(reward)
            model.delta_norm.update(next_obs - obs, model.obs_norm)
            if terminated or truncated:
                run.record(episode_return=info["episode"]["r"])
                env.reset()
            # --- learn the model ---
            # The model learns from all that has been seen, and does so from the first steps on.
            if step % args.model_train_every == 0 and (args.learned_reward or not oracle):
                for _ in range(args.model_batches):
                    run.record(**train_model())
            # --- learn critic and actor ---
            for i in range(args.updates_per_step if step > args.learning_starts else 0):
                # The number of this update in the whole run tells whether it is the actor's turn. As it
                # follows from the step, it need not be kept in a checkpoint.
                count = (step - args.learning_starts - 1) * args.updates_per_step + i + 1
                run.record(**update(count % args.policy_delay == 0))
            # --- evaluate ---
            if step % args.eval_every == 0:
                run.evaluate(actor, critic)
    return run.last_return


if __name__ == "__main__":
    main(train, Args, PRESETS)
