"""MAAC (Clavera, Fu & Abbeel 2020) on SAC: an actor trained by backpropagating through H steps of a model.

The actor maximises an imagined return: H rewards along a trajectory of an ensemble of models, and then the
critic's value of where it ends. H trades the error of the model's derivatives for that of the critic's (Lemma
4.1, which is false as it is stated: tests/reference/README.md has a counterexample and another bound). The
critic learns on imagined data, from targets of several horizons, weighted by how well the members of the
ensemble agree on them (STEVE, Buckman et al. 2018).

Equations; the paper does not number them:
    maximise Σ_{t<H} γᵗ rₜ + γᴴ minⱼ Qⱼ(s_H, a_H) - α log π(a₀|s₀)    actor (Sec. 4.3)     actor_loss
    minimise (y - Qⱼ(s, a))², mean over j                             critics (Sec. 3.1)   critic_loss
    y = Σ_h w_h meanₖ minⱼ T_hkj, w_h ∝ 1 / var T_hkj over k and j    target (STEVE)       steve_targets
    T_hkj = r + γ [Σ_{i<h} γⁱ rᵢ + γʰ Q̄ⱼ(s_h, a_h)]                   target of horizon h  steve_targets
    minimise (Δ - μₖ)² / σₖ² + log σₖ², Δ = s' - s normalised         member k (Sec. 4.3)  fit_model
    minimise -α (log π(a₀|s₀) + target entropy)                       temperature (SAC)    temperature_loss
    Q̄ ← τ Q + (1 - τ) Q̄                                               target critics       polyak

For T_hkj member k imagines h steps from s', which is s₀ there, and Q̄ⱼ is the slowly moving copy of Qⱼ
(critic_target). The variance is averaged over the batch, and nothing is added after a terminal state. SAC's
target also counts the entropy of every action on the way: with --soft-targets rᵢ - α log π(aᵢ|sᵢ) stands in
the place of rᵢ, and Q̄ⱼ(s_h, a_h) - α log π(a_h|s_h) in that of Q̄ⱼ(s_h, a_h).

In the paper, and in this file:
    s, a, r         obs, action, reward             H                     --horizon
    π_θ, Q_ψ        actor, critic                   G₁                    the gradient steps of fit_model
    f_φ, M members  model, --ensemble-size (here K) G₂                    --updates-per-step, for each step
    β               alpha, exp(log_alpha)           trajectories from ŝ₀  --num-samples
    D_env, D_model  real, imagined                  𝒯 of Algorithm 1      --rollouts, --rollout-length

Shapes: B is the batch, ds the dimension of an observation, da that of an action, N the number of critics,
K that of the members (the paper's M), M the rows of a batch for one of them, H the horizon of the function at
hand, S the number of trajectories from a state, C that of a search's candidates, E that of its elites; n is
any number of rows.

One script, four algorithms:
    SAC:           --soft-targets --horizon 0 --no-steve --real-ratio 1
    MBPO:          --soft-targets --horizon 0 --no-steve
    STEVE on SAC:  --soft-targets --horizon 0 --real-ratio 1
    MAAC:          none of these
The laptop preset of a robot leaves STEVE out, unless --steve is given.

Read dyna_td3.py first. Normaliser, layers, critic, model and buffer are its text; actor, losses, the fit of
the model and its data are new.

Differences. In places this file departs from the paper, or from its authors' code, which is the branch
vioichigo of github.com/iclavera/meta-mb ("theirs" below). A mark says whom the file follows there: [paper] is
the paper; [authors' code] is their code, where the paper is silent or says something else; [ours] is neither.
The paper has no table of settings: networks, learning rates, batches and buffers of which no line below
speaks are those of their code.

Of the actor's objective:
- [authors' code] H is 4 (2 on Walker2d), five samples are taken, and a random member answers for each row at
  each step. The entropy is that of π in s₀ alone; the paper writes β H(π) and does not say where.
- [paper] Each sample is a whole trajectory from s₀. [authors' code] The smaller critic stands at its end,
  where the paper writes one Q and says only that two are trained. Their last version follows one trajectory,
  draws five actions in its last state, and takes the smaller of the two critics' means.
- [ours] The model's standard deviation is exp(logvar / 2), also where a gradient is taken. In theirs the
  rollouts have it, but actor and targets use exp(logvar), which is the variance.
- [ours] A reward is what the environment pays. Wang et al.'s robots (mbbl/) are paid for the state before the
  step, and so they are here wherever they are imagined. In theirs the rewards that are differentiated, and
  those in targets, are for the state after it on HalfCheetah and Ant, so that their actor looks one state
  farther with the same H; on Walker2d the height is that after the step in all that is imagined.
- [ours] Nothing is paid after the first terminal state of a trajectory. Theirs looks back one state only,
  which makes no difference on their robots, as these never terminate.
- [ours] Predictions are not clipped; theirs are, to [-100, 100]. A run whose numbers are not finite ends.

Of the critic's target and the temperature:
- [ours] A horizon has a target for each member and each target critic. Theirs has one for each member of a
  random half, with the smaller critic, and at horizon 0 one value that is copied: it has no variance and
  takes all the weight, so that STEVE is left out in effect.
- [ours] STEVE averages over members and critics and weighs every row by itself. Here each member has its
  smaller critic, as in SAC, and the variances are pooled over the batch, since at horizon 0 only two critics
  and the noise of the action differ, which is too little to tell a variance for one row.
- [ours] A member answers all the steps of its trajectory. In theirs one trajectory is shared and each member
  leaves it for the last step, so that members can differ in that step's state only (and in rewards that look
  at it).
- [paper] No entropy counts in a target, since the Bellman error of section 3.1 has none. In theirs it counts
  in the last state of a target, and in SAC at every step (--soft-targets). On HalfCheetah-v4 a seed of three
  fails with it. The actor's objective has entropy in s₀ alone, so that the temperature must rise to hold it
  there, and the targets then count the temperature times the negative entropy of later states as a cost,
  which outgrows the rewards. Without it two seeds overestimated for a while (tests/reference/README.md).
- [authors' code] The targets are those of slowly moving copies of the critics, where section 3.1 writes Q.
- [ours] The temperature's loss is linear in α, as SAC's authors print it; theirs is linear in log α. The two
  gradients differ by the factor α, which Adam divides out as long as α changes slowly.

Of the data:
- [ours] Every environment step is followed by G₂ updates, and every 250 by a fit, so that the order does not
  depend on the length of an episode. Theirs acts for 1001 steps, fits once, and then makes four times 2000
  updates, each time after new rollouts; the newest 1001 steps reach its replay buffer after these updates.
- [ours] An update trains the critics, then the actor, then α. Algorithm 1 has the actor first, and theirs
  trains all from the same old parameters.
- [authors' code] A rollout is one step, from a state of D_env, and a batch has 5% of real rows (13 of 256;
  theirs rounds down to 12). The newest two million imagined rows are kept.
- [authors' code] On Hopper 15 and on Ant 25 times as many rollouts are made in the end (`--rollout-growth`;
  their "rollout length" never was a length). [ours] The number grows between steps 20,000 and 100,000 of all.
  Theirs grows between iterations 20 and 100, of 1001 steps each and after 5005 random ones, which is about
  6000 steps later.
- [ours] Each row is as the environment gave it. In theirs the last of 1001 rows has s in the place of s'.
- [ours] A run has 100,000 steps, and its robot is by default Gymnasium's HalfCheetah-v4. Theirs has 200
  iterations of 1001 steps after the random ones, on the robot that is mbbl/HalfCheetah-v0 here.

Of the model:
- [authors' code] Each member is trained on four fifths of the rows and judged on the other fifth, which is
  drawn for each member separately. This makes the members differ, beside their first weights and the order of
  their rows; the bootstrap that the paper names would draw rows with replacement. [ours] A member is judged
  on at most 2000 rows, for speed.
- [ours] A member is done when its held-out loss has fallen by less than 0.01 in 5 epochs, or in as many more
  as make 100 gradient steps, and gets back the weights of its best epoch, however small their gain. With
  epochs alone a fit of few rows ends almost untrained, and its noise ruins the critic. Theirs stops when a
  moving average of that loss rises, and keeps the last weights. A fit has 2000 epochs at most; theirs 200.
- [ours] Every fit begins with fresh Adam moments, since those of the last one belong to weights that were
  given up. Theirs keeps them from fit to fit.
- [ours] One normaliser of observations serves model, actor and critic and follows every step. In theirs each
  member has its own, of the rows that it trains on, computed at each fit.
- [ours] A dimension that varies by no more than the rounding of float32 explains is taken for constant and
  predicted to stay as it is; theirs is divided by its standard deviation, however small.
- [ours] A sigmoid keeps the log-variance between fixed bounds, -10 and 0.5. Theirs bends it at either bound
  with a softplus, and its bounds are learned, starting there, and their distance costs something in the loss.
- [ours] Actor and critic are swish networks on normalised observations, as in the other scripts; theirs are
  relu or tanh ones, by environment, on raw observations.

Of planning (`python -m common.evaluate RUN --plan`, section 5.4):
- [authors' code] The search looks 5 steps ahead with 256 candidates, repeats 5 times, takes the best tenth
  for elites, and keeps a tenth of the old mean and variance.
- [ours] The last action is the policy's, and the value of the last state is discounted by γᴴ, as in the
  paper's objective. Theirs searches for the last action as well and discounts that value by γ once more.
- [ours] The action is the tanh of the last mean; theirs is that mean itself, clipped. Our search is bounded
  by the tanh alone; theirs also keeps candidates and deviations within [-1, 1] before it.

This run takes 4 minutes, and five seeds ended with returns between -133 and -109:

python maac_sac.py --env-id Pendulum-v1 --preset laptop

Try this:
- Give `--horizon 0`: the actor no longer looks through the model. Two of five seeds do not reach -200 in
  3000 steps, and end at -515 and -505. The others reach it at steps 1500, 2250 and 1750, where with these
  seeds the command above does at 1000, 1250 and 1000.
- Give `--num-samples 1`, so that one trajectory starts from each state (the laptop preset has two on the
  pendulum). It makes no difference here: five seeds end between -145 and -109, and between -133 and -109 with
  the command above.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.wrappers import RecordEpisodeStatistics
from torch import nn

from common import BadInput
from common.acceleration import accelerate
from common.args import main, prepare
from common.envs import ReplayableEnv, make_env
from common.evaluate import as_policy, load_networks
from common.rewards import reward_fn, termination_fn
from common.run import Run


@dataclass
class Args:
    """With --preset laptop a run takes this long on a busy core, and its last evaluation returns:

    - Pendulum-v1, 3,000 steps: 4 minutes, -133 to -109 (5 seeds)
    - HalfCheetah-v4, 10,000 steps: 29 to 33 minutes, 1605 to 2207 (3 seeds)
    - HalfCheetah-v4, 10,000 steps: 24 to 112 minutes, -263 to 2177 (3 seeds)
      with --soft-targets
    - HalfCheetah-v4, 10,000 steps: 60 to 61 minutes, -426 to 2269 (3 seeds)
      with --soft-targets --steve (an update takes 2.8 times as long)

    The longest times are those of runs beside much other work. The paper preset takes a core more than a day
    on HalfCheetah-v4. What it returns after its 100,000 steps is not known, as no such run has been taken to
    its end.
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
    learning_starts: int = 5000  # Actions are random for this many steps before anything learns.
    buffer_size: int = 1_000_000  # The replay buffer keeps this many of the newest transitions.
    real_ratio: float = 0.05  # This share of a batch is real transitions, and the rest is imagined ones.
    rollouts: int = 100_000  # This many rollouts are imagined after each fit, from replayed states.
    rollout_growth: float = 1.0  # The number of rollouts grows by this factor from step 20,000 to 100,000.
    rollout_length: int = 1  # A rollout has this many steps.
    model_buffer_size: int = 2_000_000  # This many of the newest imagined transitions are kept.
    # --- actor and critic ---
    updates_per_step: int = 8  # There are this many updates (the paper's G2) after each environment step.
    batch_size: int = 256  # An update looks at this many states.
    gamma: float = 0.99  # This is the discount factor.
    tau: float = 0.005  # The target critics move this share of the way at each update.
    lr: float = 3e-4  # This is the learning rate of actor, critic and temperature.
    actor_hidden: int = 256  # Each of the actor's two hidden layers has this many units.
    critic_hidden: int = 256  # Each of a critic's two hidden layers has this many units.
    num_critics: int = 2  # There are this many critics, and the smallest of their values counts.
    layer_norm: bool = False  # Layer normalisation in the critics keeps their values from running away.
    target_entropy: float | None = None  # Entropy is held near this, by default minus the action's dimension.
    soft_targets: bool = False  # The critic's target counts the entropy of later actions, too, as in SAC.
    # --- MAAC ---
    horizon: int = 4  # This is H, the number of model steps in the actor's objective.
    num_samples: int = 5  # The actor's objective is the mean over this many trajectories from each state.
    steve: bool = True  # The critic's target is a mix of several horizons.
    steve_horizon: int = 2  # This is the longest of those horizons.
    # --- model ---
    ensemble_size: int = 8  # The model has this many members, and one of them answers for each imagined row.
    model_hidden: int = 200  # Each hidden layer of the model has this many units.
    model_layers: int = 4  # The model has this many hidden layers.
    model_lr: float = 1e-3  # This is the learning rate of the model.
    model_train_every: int = 250  # The model is fitted after every so many environment steps.


# The laptop preset is ours, so that one core needs minutes for classic control and about half an hour for a
# robot. A robot keeps the authors' networks and their 5000 random steps; steps and rollouts are fewer. It is
# without two parts of the algorithm: a state has one trajectory, which is the single-sample ablation of
# figure 4, and STEVE is left out, since on HalfCheetah-v4 it all but ignored the model and took 2.8 times as
# long (--steve has it). For classic control the algorithm is whole. There H is 3, networks and batches are
# smaller, updates are fewer, the learning rate is higher, and fits are more frequent.
LAPTOP = dict(total_timesteps=10_000, eval_every=250, rollouts=10_000, num_samples=1, steve=False)
LAPTOP_CLASSIC = dict(
    total_timesteps=3000, eval_every=250, learning_starts=250, rollouts=4000, model_buffer_size=20_000,
    batch_size=64, updates_per_step=4, lr=1e-3, actor_hidden=64, critic_hidden=128, horizon=3, num_samples=2,
    model_hidden=64, model_layers=2, model_train_every=100)  # fmt: skip
OWN = dict(Walker2d=dict(horizon=2), Hopper=dict(rollout_growth=15.0), Ant=dict(rollout_growth=25.0))
ROBOTS = {env_id: values for name, values in OWN.items()
          for env_id in (f"{name}-v4", f"{name}-v5", f"mbbl/{name}-v0")}
PRESETS = {  # --preset: {environment, or "*" for any other: what differs from the defaults above}
    "paper": {"*": {}} | ROBOTS,
    "laptop": {"*": LAPTOP, "Pendulum-v1": LAPTOP_CLASSIC, "ContinuousCartPole-v1": LAPTOP_CLASSIC,
               **{env_id: LAPTOP | values for env_id, values in ROBOTS.items()}},
}
GROWTH = (20_000, 100_000)  # steps between which the number of imagined trajectories grows
MODEL_BATCH, HELD_OUT = 256, 5  # rows per member and gradient step; one row in 5 judges a member
PATIENCE = 5, 100  # epochs, and gradient steps, without progress before a member is done
LOGVAR = (-10.0, 0.5)  # bounds on the model's log-variance


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
    """pi(a|s), the tanh of a Gaussian; as a function, the tanh of its mean: (B, ds) -> (B, da)."""
    def __init__(self, obs_norm, action_dim, hidden):
        super().__init__()
        self.obs_norm = obs_norm
        # The actor is an ensemble of one, so that it needs no layers of a kind of its own.
        self.net = mlp(1, len(obs_norm.mean), hidden, 2, 2 * action_dim)

    def gaussian(self, obs):  # before the tanh: mean, standard deviation (B, da)
        mean, log_std = self.net(self.obs_norm(obs)[None])[0].chunk(2, -1)
        return mean, log_std.clamp(-20, 2).exp()

    def forward(self, obs):
        return self.gaussian(obs)[0].tanh()

    def sample(self, obs):  # -> action (B, da) and its log-probability (B,), both differentiable
        mean, std = self.gaussian(obs)
        noise = torch.randn_like(mean)
        u = mean + std * noise
        # log N(u; μ, σ) comes from the noise itself, as u - μ would lose precision where σ is small.
        log_prob = -0.5 * noise**2 - std.log() - 0.5 * math.log(2 * math.pi)
        # The density of tanh(u) is that of u divided by the slope of tanh: log π = log N - Σ log(1 -
        # tanh(u)²). This form of log(1 - tanh(u)²) does not lose precision where tanh is flat.
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return u.tanh(), (log_prob - log_slope).sum(-1)


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


def extend(buffer, *columns):
    """Adds a batch of transitions (n, ds), (n, da), (n,), (n, ds), (n,) to a buffer."""
    # The next rows follow the newest one, and from the end of the buffer they go on at its start.
    rows = torch.cat([column.reshape(len(column), -1).float() for column in columns], 1)
    buffer.rows[(buffer.added + torch.arange(len(rows), device=rows.device)) % len(buffer.rows)] = rows
    buffer.added += len(rows)
    buffer.size.fill_(min(buffer.added, len(buffer.rows)))


# --- model learning -----------------------------------------------------------------------------------------
def model_losses(model, obs, action, next_obs):
    """The loss of each member (K,), for obs and next_obs (K, M, ds) and action (K, M, da)   (Sec. 4.3).

    It is twice the negative log-likelihood without constants, and a mean over the ds dimensions where a
    likelihood has their sum.
    """
    mean, logvar = model(obs, action)  # (K, M, ds): M rows for each member
    # (Δ - μₖ)² / σₖ² + log σₖ²   (Sec. 4.3)
    return ((mean - model.delta_norm(next_obs - obs)) ** 2 * (-logvar).exp() + logvar).mean((1, 2))


class HeldOut(nn.Module):
    """The mask (rows, K), bool, is true where member k is judged on a row and not trained on it.

    Of every HELD_OUT consecutive rows of the buffer, each member is judged on one, which is drawn at random.
    """
    def __init__(self, rows, members):
        super().__init__()
        pick = torch.randint(HELD_OUT, (-(-rows // HELD_OUT), 1, members))
        self.register_buffer("mask", (torch.arange(HELD_OUT)[:, None] == pick).flatten(0, 1)[:rows])


def fit_model(model, optimizer, buffer, held_out, max_epochs=2000):
    """Maximum likelihood with early stopping, each member for itself -> held-out losses (K,), epochs.

    held_out (capacity, K): the rows that member k is judged on and never trained on, which makes the
    members differ further. A member without progress for long (PATIENCE) is done; in the end each gets back
    the weights with which it did best.
    """
    # Each member has rows to train on and rows that judge it; the two never mix, from the first fit to the
    # last.
    size = int(buffer.size)
    masks = (~held_out[:size], held_out[:size])
    train, test = ([mask[:, k].nonzero()[:, 0] for k in range(model.members)] for mask in masks)
    obs, action, _, next_obs, _ = buffer.rows.split(buffer.widths, -1)

    def draw(rows):  # as many for each member as the one with the fewest has, in random order: (K, n)
        fewest = min(len(r) for r in rows)
        return torch.stack([r[torch.randperm(len(r), device=r.device)[:fewest]] for r in rows])

    # With few rows an epoch is a handful of steps, in which no network learns anything. A member's patience
    # is therefore counted in gradient steps as well.
    steps = math.ceil(min(map(len, train)) / MODEL_BATCH)  # in an epoch
    patience = max(PATIENCE[0], math.ceil(PATIENCE[1] / steps))
    # [ours] At most 2000 rows judge a member, for speed.
    judge = draw(test)[:, :2000]
    # Adam's moments belong to the last steps of the fit before, whose weights were given up for better ones.
    optimizer.state.clear()
    parameters = list(model.parameters())
    best = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        lowest = model_losses(model, obs[judge], action[judge], next_obs[judge])  # (K,) the first to beat
    reached, stale = lowest, torch.zeros_like(lowest)
    for epochs in range(1, max_epochs + 1):  # noqa: B007
        # This is the fit itself: one epoch of maximum likelihood, every member on rows of its own. What
        # follows decides when to stop and which weights to keep.
        for rows in draw(train).split(MODEL_BATCH, 1):
            descend(optimizer, model_losses(model, obs[rows], action[rows], next_obs[rows]).mean())
        with torch.no_grad():
            losses = model_losses(model, obs[judge], action[judge], next_obs[judge])
            # A member that is done is still trained, since all members share one tensor for each layer, but
            # its best weights no longer change. For the others the best weights are kept however small the
            # gain, and only a gain of 0.01 renews the patience.
            better = (losses < lowest) & (stale < patience)  # (K,)
            lowest = torch.where(better, losses, lowest)
            progress = lowest < reached - 0.01  # (K,)
            reached, stale = torch.where(progress, lowest, reached), torch.where(progress, 0, stale + 1)
            best = [torch.where(better[:, None, None], p, b) for p, b in zip(parameters, best, strict=True)]
        # A loss that is not finite is handed back, and the run stops with a message about it.
        if not losses.isfinite().all():
            return losses, epochs
        if (stale >= patience).all():
            break
    with torch.no_grad():
        torch._foreach_copy_(parameters, best)
    return lowest, epochs


def imagine(model, reward_of, terminated_at, obs, action, shuffle=True):
    """One step of the model: (n, ds), (n, da) -> reward (n,), next_obs (n, ds), terminated (n,).

    Share k of the rows goes through member k. With shuffle the shares are drawn anew at each step, so that a
    trajectory wanders between members (Chua et al. 2018 call this TS1); without it a row that stays in its
    place stays with its member.
    """
    noise = torch.randn_like(obs)
    if shuffle:
        # A random order decides which member a row goes to; `order.argsort()` is the way back.
        order = torch.rand(len(obs), device=obs.device).argsort()
        next_obs = model.sample(obs[order], action[order], noise)[order.argsort()]
    else:
        next_obs = model.sample(obs, action, noise)
    return reward_of(obs, action, next_obs), next_obs, terminated_at(next_obs)


@torch.no_grad()
def imagine_data(actor, step, source, target, n, length):
    """Trajectories of the actor in the model, from n states of D_env, go to D_model.

    `step(obs, action)` is one step of the model, as `imagine` takes it. Where a trajectory has ended, a new
    one begins in its place.
    """
    # Algorithm 1, line 7: 𝒯 imagined trajectories begin in states of D_env, and what they meet goes to
    # D_model.
    obs = source.sample(n)[0]
    for _ in range(length):
        action = actor.sample(obs)[0]
        reward, next_obs, terminated = step(obs, action)
        extend(target, obs, action, reward, next_obs, terminated)
        obs = torch.where(terminated[:, None], source.sample(n)[0], next_obs)


# --- losses -------------------------------------------------------------------------------------------------
@torch.no_grad()
def steve_targets(actor, critic_target, step, alpha, reward, next_obs, terminated, gamma, horizon, members):
    """TD target (B,), and the weights (H + 1,) of the horizons 0 ... H in it; here H is --steve-horizon.

    T_hkj = r + gamma [sum_{i<h} gamma^i (r_i - alpha log pi_i) + gamma^h (Q_j(s_h, a_h) - alpha log pi_h)]
    begins in s_0 = s', for member k of the model and target critic j; after a terminal state nothing is
    added. Horizon 0 with one member is SAC's target. STEVE weighs the horizons by 1 / variance over members
    and critics, to which the noise of actions and of the model adds. With an alpha of 0 there is no entropy
    in the target, as in section 3.1. `step(obs, action)` is one step of the model, and returns reward (n,),
    next_obs (n, ds) and terminated (n,).
    """
    # Every member gets a copy of the batch and answers all steps of the trajectories that start in its copy.
    # T₀ needs no step of the model. From one horizon to the next, one more imagined reward is added, and the
    # target critic is asked one step later.
    obs, total = next_obs.repeat(members, 1), reward.repeat(members)  # (K B, ds), (K B,): K shares
    discount = gamma * (~terminated).float().repeat(members)  # (K B,): gamma^(h + 1), 0 after the end
    targets = []
    for h in range(horizon + 1):
        action, log_prob = actor.sample(obs)
        targets.append(total + discount * (critic_target(obs, action) - alpha * log_prob))  # (N, K B)
        if h < horizon:
            reward, next_obs, terminated = step(obs, action)
            total = total + discount * (reward - alpha * log_prob)
            obs, discount = next_obs, gamma * discount * ~terminated
    # Where members and critics disagree about a horizon, its target counts less: w_h ∝ 1 / var T_hkj.
    targets = torch.stack(targets).unflatten(-1, (members, -1))  # (H + 1, N, K, B)
    variance = targets.var((1, 2), correction=0).mean(-1)  # (H + 1,), pooled over the batch
    weights = (variance + 1e-8).reciprocal()
    weights = weights / weights.sum()
    # y = Σ_h w_h meanₖ minⱼ T_hkj   (STEVE, which Sec. 4.3 names and does not write down)
    return weights @ targets.min(1).values.mean(1), weights  # the smaller critic, mean over members


def critic_loss(critic, obs, action, y):
    """Squared Bellman error of both critics."""
    # (y - Qⱼ(s, a))², mean over both critics and the batch   (Sec. 3.1)
    return ((y - critic(obs, action)) ** 2).mean()


def actor_loss(actor, critic, step, alpha, obs, gamma, horizon, samples):
    """-J, a scalar to be minimised, and log pi(a_0|s_0) (S B,), for obs (B, ds)   (Sec. 4.3).

    J is the sum of H imagined rewards, of the smaller critic's value of where they end, and of the entropy in
    s_0. Its gradient is pathwise: it runs through policy, model and reward of every step, and through the
    critic's inputs. `step(obs, action)` is one step of the model, as in steve_targets.
    """
    obs = obs.repeat(samples, 1)  # (S B, ds): several trajectories from each state
    action, first_log_prob = actor.sample(obs)
    total, discount = 0.0, 1.0  # discount: gamma^t, and 0 from termination on
    # Nothing is detached from here on: the actor sees how its first action changes all the states, the later
    # actions and the rewards that follow.
    for _ in range(horizon):
        reward, obs, terminated = step(obs, action)
        total = total + discount * reward
        discount = gamma * discount * ~terminated
        action, _ = actor.sample(obs)
    # Σ γᵗ rₜ + γᴴ minⱼ Qⱼ(s_H, a_H) - α log π(a₀ | s₀), for t < H   (Sec. 4.3; minⱼ is their code's)
    total = total + discount * critic(obs, action).min(0).values  # (S B,)
    return (alpha * first_log_prob - total).mean(), first_log_prob


def temperature_loss(log_alpha, log_prob, target_entropy):
    """A scalar, for log_prob (S B,), whose descent raises alpha while the entropy is below its target."""
    # -α (log π(a₀ | s₀) + target entropy): the entropy is the mean of -log π. This is linear in α and not in
    # log α, although log α is the parameter that is trained.
    return -(log_alpha.exp() * (log_prob.detach() + target_entropy)).mean()


@torch.no_grad()
def plan_action(actor, critic, step, obs, gamma, horizon=5, candidates=256, iterations=5, elites=26):
    """A cross-entropy search with the model for actions (n, da) in states (n, ds)   (Sec. 5.4).

    It looks for actions before the tanh, and the critic values the state after the last of them. Mean and
    variance begin as the policy's along an imagined trajectory, and after each round they move nine tenths of
    the way to those of the best candidates. The first action of the last mean is taken. `step(obs, action)`
    is one step of the model, as in steve_targets.
    """
    # The search begins with the policy's own actions along a trajectory that the model imagines.
    mean, std, state = [], [], obs
    start = obs.repeat_interleave(candidates, 0)  # (n C, ds): C candidates for each state
    for _ in range(horizon):
        m, s = actor.gaussian(state)
        mean.append(m), std.append(s)
        # A step of the model needs a multiple of K rows, so every state is asked about C times, and the
        # trajectory goes on from the first of the C answers.
        copies = (x.repeat_interleave(candidates, 0) for x in (state, m.tanh()))  # of n C rows
        state = step(*copies)[1][::candidates]  # (n, ds)
    mean, std = torch.stack(mean, 1)[:, None], torch.stack(std, 1)[:, None]  # (n, 1, H, da)
    for _ in range(iterations):
        # Candidates are drawn, imagined, and judged by their rewards and by the critic at their end.
        noise = torch.randn(len(obs), candidates, *mean.shape[2:], device=mean.device)
        u = mean + std * noise  # (n, C, H, da)
        state, score, discount = start, 0.0, 1.0
        for t in range(horizon):
            reward, state, terminated = step(state, u[:, :, t].flatten(0, 1).tanh())
            score = score + discount * reward
            discount = gamma * discount * ~terminated
        score = score + discount * critic(state, actor(state)).min(0).values  # (n C,)
        # The distribution moves to that of the elites; a tenth of the old one stays, against hasty
        # convergence.
        index = score.view(len(obs), candidates).topk(elites).indices  # (n, E): E elites
        best = u[torch.arange(len(obs), device=u.device)[:, None], index]  # (n, E, H, da)
        mean = 0.1 * mean + 0.9 * best.mean(1, keepdim=True)
        std = (0.1 * std**2 + 0.9 * best.var(1, correction=0, keepdim=True)).sqrt()
    return mean[:, 0, 0].tanh()


# --- optimisation -------------------------------------------------------------------------------------------
def adam(module, lr):
    """Adam of all parameters of a module."""
    return torch.optim.Adam(module.parameters(), lr, foreach=True)


def descend(optimizer, loss):
    """One step of the optimiser's parameters alone; returns the norm of their gradient."""
    # A loss may reach networks that are not to be trained by it, such as the critic in the actor's loss.
    # `inputs` keeps the gradient from being stored in any of them.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
    optimizer.step()
    return norm


@torch.no_grad()
def polyak(target, source, tau):
    """target <- (1 - tau) target + tau source."""
    # Q̄ ← τ Q + (1 - τ) Q̄, for all parameters in one call.
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


# --- training -----------------------------------------------------------------------------------------------
def networks(args, obs_dim, action_dim):
    """{name: network}: critic, its target, model and actor."""
    # One normaliser of observations serves all networks, so that the target sees what the trained ones see.
    obs_norm, critic_args = Normaliser(obs_dim), (args.critic_hidden, args.num_critics, args.layer_norm)
    critic, critic_target = (Critic(obs_norm, action_dim, *critic_args) for _ in range(2))
    # The target begins as a copy, and is moved by `polyak` alone: no optimiser has its parameters.
    critic_target.requires_grad_(False).load_state_dict(critic.state_dict())
    model = Dynamics(obs_norm, action_dim, args.model_hidden, args.model_layers, args.ensemble_size)
    actor = Actor(obs_norm, action_dim, args.actor_hidden)
    return dict(critic=critic, critic_target=critic_target, model=model, actor=actor)


def load_policy(run_dir, plan=False):
    """The policy of a run without noise: float32 arrays (n, ds) -> (n, da).

    With `plan` the policy searches for its actions with the model (plan_action).
    """
    args, nets = load_networks(run_dir, Args, networks, only=None if plan else ["actor"])
    critic, _, model, actor = nets.values()
    if not plan:
        return as_policy(actor)
    if not model.net[-1].bias.any():  # they begin at 0
        raise BadInput(f"--plan: the run in {run_dir} has trained no model to plan with; leave --plan out.")
    step = partial(imagine, model, reward_fn(args.env_id), termination_fn(args.env_id))
    candidates = 256 // args.ensemble_size * args.ensemble_size
    return as_policy(partial(plan_action, actor, critic, step, gamma=args.gamma, candidates=candidates))


def train(args: Args) -> float:
    """Trains one agent in one run folder; returns the mean return of its last evaluation."""
    device = prepare(args)
    env = ReplayableEnv(RecordEpisodeStatistics(make_env(args.env_id, args.seed)))
    env.reset()
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    uses_model = args.horizon > 0 or args.steve or args.real_ratio < 1
    if uses_model and min(args.learning_starts, args.buffer_size) < 2 * HELD_OUT:
        raise BadInput(f"--learning-starts, --buffer-size: the model needs at least {2 * HELD_OUT} steps.")

    nets = {name: net.to(device) for name, net in networks(args, obs_dim, action_dim).items()}
    critic, critic_target, model, actor = nets.values()
    temperature = nn.ParameterDict({"log_alpha": torch.zeros(())}).to(device)
    real = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)  # D_env
    imagined = ReplayBuffer(args.model_buffer_size if args.real_ratio < 1 else 1, obs_dim, action_dim, device)
    held_out = HeldOut(args.buffer_size, args.ensemble_size).to(device)
    actor_opt, critic_opt, alpha_opt = (adam(net, args.lr) for net in (actor, critic, temperature))
    model_opt = adam(model, args.model_lr)
    target_entropy = -action_dim if args.target_entropy is None else args.target_entropy
    # The actor and the rollouts send every row through a random member, drawn anew at each step. In a target
    # of STEVE one member answers a whole trajectory, because the horizons are weighed by how much the members
    # disagree.
    known = (reward_fn(args.env_id), termination_fn(args.env_id)) if uses_model else (None, None)
    step_shuffled, step_member = (partial(imagine, model, *known, shuffle=s) for s in (True, False))
    # Without STEVE the target is that of SAC: horizon 0, and one member, which is never asked.
    target_horizon, target_members = (args.steve_horizon, args.ensemble_size) if args.steve else (0, 1)
    samples = args.num_samples if args.horizon else 1  # SAC takes one action in a state

    def sample_batch():
        """A batch (B, ds), (B, da), (B,), (B, ds), (B,), of which the share real_ratio is from D_env."""
        # Algorithm 1, line 8: 𝒟 ← D_model ∪ D_env. Here each of the two gives a fixed share of a batch.
        n = round(args.real_ratio * args.batch_size)
        if n == args.batch_size:
            return real.sample(n)
        parts = real.sample(n), imagined.sample(args.batch_size - n)
        return [torch.cat(pair) for pair in zip(*parts, strict=True)]

    def update():
        """One update of the critics, the actor and the temperature."""
        # Algorithm 1, lines 9 to 11, G₂ times a step: critics, actor and temperature learn on real and
        # imagined rows alike.
        obs, action, reward, next_obs, terminated = sample_batch()
        alpha = temperature["log_alpha"].exp().detach()
        # The entropy counts in the actor's objective, and in the targets only if they are to be soft.
        y, weights = steve_targets(actor, critic_target, step_member, alpha * args.soft_targets, reward,
                                   next_obs, terminated, args.gamma, target_horizon, target_members)
        loss = critic_loss(critic, obs, action, y)
        log = dict(critic_loss=loss, critic_grad=descend(critic_opt, loss))
        loss, log_prob = actor_loss(actor, critic, step_shuffled, alpha, obs, args.gamma, args.horizon,
                                    samples)  # fmt: skip
        log |= dict(actor_loss=loss, actor_grad=descend(actor_opt, loss))
        log |= dict(alpha=alpha, entropy=-log_prob.mean())
        descend(alpha_opt, temperature_loss(temperature["log_alpha"], log_prob, target_entropy))
        polyak(critic_target, critic, args.tau)
        return log | {f"weight_{h}": w for h, w in enumerate(weights)}

    update = accelerate(update, args.accelerate, device, [actor_opt, critic_opt, alpha_opt])
    # This and the random state, which Run saves, are everything that changes during a run. A checkpoint has
    # the state of each part, so that a stopped run goes on bit for bit.
    state = dict(env=env, real=real, imagined=imagined, **nets, temperature=temperature, held_out=held_out,
                 actor_opt=actor_opt, critic_opt=critic_opt, alpha_opt=alpha_opt, model_opt=model_opt)
    with Run(args, __file__, state, device) as run:
        if run.step == 0:
            run.evaluate(actor)
        for step in run.steps():
            # --- act ---
            # The first actions are uniform random ones, as nothing has been learned yet.
            obs = env.obs
            if step <= args.learning_starts:
                action = torch.empty(action_dim, device=device).uniform_(-1, 1)
            else:
                action = actor.sample(torch.as_tensor(obs[None], device=device))[0][0]
            # On a GPU every transfer makes the CPU wait, so one transfer brings the action together with all
            # numbers that were recorded since the last one. If one of them is not finite, the run ends.
            action = run.fetch(action)
            next_obs, reward, terminated, truncated, info = env.step(action)
            # --- store ---
            # Algorithm 1, line 3: D_env gets what the policy meets in the environment.
            real.add(obs, action, reward, next_obs, terminated)
            model.obs_norm.update(obs)
            model.action_norm.update(action)
            model.delta_norm.update(next_obs - obs, model.obs_norm)
            if terminated or truncated:
                run.record(episode_return=info["episode"]["r"])
                env.reset()
            # --- learn the model, imagine ---
            # Algorithm 1, lines 4 to 7: the model is fitted to D_env, from the weights that it has, and
            # D_model gets new rows.
            since = step - args.learning_starts
            if uses_model and since >= 0 and since % args.model_train_every == 0:
                losses, epochs = fit_model(model, model_opt, real, held_out.mask)
                run.record(model_loss=losses.mean(), model_epochs=epochs)
                if args.real_ratio < 1:
                    n = args.rollouts // args.ensemble_size * args.ensemble_size
                    for _ in range(int(np.interp(step, GROWTH, (1, args.rollout_growth)))):
                        imagine_data(actor, step_shuffled, real, imagined, n, args.rollout_length)
            # --- learn critic and actor ---
            for _ in range(args.updates_per_step if since > 0 else 0):
                run.record(**update())
            # --- evaluate ---
            if step % args.eval_every == 0:
                run.evaluate(actor)
    return run.last_return


if __name__ == "__main__":
    main(train, Args, PRESETS)
