# %% [markdown]
# # 6. Below four bits
#
# With 16 levels a weight can be rounded and forgotten. With four, three or two, the *grid* decides, then training
# does. We look at the grids, at what rounding costs, and at what a minute of training brings back.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import calib
from calib.quantizers import DualBinarySpec, LevelSpec
from calib.recipe import Scheme
from calib.solvers import quantize_weight
from model_zoo import load_model

torch.set_num_threads(1)
source = Path("../../../shared/models/stories260k")
model, tokenizer = load_model(source, progress=False)
weight = model.model.layers[2].mlp.gate_proj.weight.detach()
print(f"one weight of stories260k: {tuple(weight.shape)}")

# %% [markdown]
# **The grids.** One row of the weight and the levels of each grid that it uses, at the grid's best scale. Even grids
# (SEQ) spend no level on zero; the dual binary grid (FDB) has two scales, and zero among its levels.

# %%
grids = {
    "1 bit": LevelSpec(kind="binary", levels=2),
    "1.58 bit, SEQ": LevelSpec(kind="seq", levels=3),
    "2 bit, SEQ": LevelSpec(kind="seq", levels=4),
    "2 bit, FDB": DualBinarySpec(),
    "3 bit, SEQ": LevelSpec(kind="seq", levels=8),
    "4 bit, SEQ": LevelSpec(kind="seq", levels=16),
}
values = {name: quantize_weight(weight, spec) for name, spec in grids.items()}
fig, ax = plt.subplots(figsize=(8, 3.2))
ax.hist(weight[0].numpy(), bins=40, color="lightgray", bottom=len(grids), weights=[0.06] * weight.shape[1])
for i, rounded in enumerate(values.values()):
    levels = rounded[0].unique()
    ax.plot(levels, [len(grids) - 1 - i] * len(levels), "|", markersize=16, markeredgewidth=2)
ax.set_yticks(range(len(grids)), list(grids)[::-1])
ax.set(xlabel="weight", title="levels for one row; above, its weights")
plt.show()

# %% [markdown]
# **The error.** Relative squared error of the weight. Each bit is worth about a factor of four, until there are
# hardly any levels left.

# %%
errors = {name: float((rounded - weight).square().sum() / weight.square().sum()) for name, rounded in values.items()}
fig, ax = plt.subplots(figsize=(8, 2.6))
ax.barh(list(errors), list(errors.values()), color="tab:orange")
for i, error in enumerate(errors.values()):
    ax.text(error, i, f" {error:.2%}", va="center", fontsize=8)
ax.set(xlabel="squared error of the weight, relative, logarithmic", xscale="log")
ax.set_xlim(right=2)
ax.invert_yaxis()
plt.show()

# %% [markdown]
# **The model.** The same grids on all linears, rounded to nearest, judged on windows that calibration did not see. A
# chance guess over the vocabulary of 512 tokens would be at ln 512 = 6.2 nats.

# %%
losses, results = {}, {}
for name, spec in grids.items():
    scheme = Scheme(name=name, weights=spec)
    results[name] = calib.quantize(source, scheme, "rtn", "self", samples=32, seq_len=128, progress=False)
    quality = results[name].report["quality"]
    losses[name] = torch.tensor(quality["quantized"]).log().item()
base = torch.tensor(quality["float"]).log().item()
fig, ax = plt.subplots(figsize=(8, 2.6))
ax.bar(list(losses), list(losses.values()), color="tab:orange")
ax.axhline(base, color="black", linestyle="--", label=f"float: {base:.2f}")
ax.set(ylabel="loss, nats a token")
ax.tick_params(axis="x", labelsize=8)
ax.legend()
plt.show()
print(", ".join(f"{name} {loss:.2f}" for name, loss in losses.items()))

# %% [markdown]
# **Training brings it back.** `calib.tune` starts from the rounded codes, trains weights *through* the grid towards
# the float model's answers, and gives back a model on the same grid. A short run at 2 bits:

# %%
before = losses["2 bit, SEQ"]
tuned = calib.tune(
    results["2 bit, SEQ"],
    source,
    "self",
    loss="kd",
    trainable=("all",),
    steps=30,
    lr=3e-3,
    samples=128,
    seq_len=128,
    batch_size=8,
    progress=False,
)
curve = tuned.report["loss"]
fig, ax = plt.subplots(figsize=(8, 2.6))
ax.plot(curve)
ax.set(xlabel="step", ylabel="distance from the float model (KD loss)")
plt.show()
print(f"distance from the float model: {curve[0]:.2f} at the first step, {sum(curve[-5:]) / 5:.2f} over the last five")

# %% [markdown]
# And in words. The same beginning, continued by the float model, and by two bits a weight after training:

# %%
prompt = tokenizer("Once upon a time, there was a little girl", return_tensors="pt")["input_ids"]
for label, network in (("float", model), ("2 bits, trained", tuned.model)):
    with torch.no_grad():
        ids = network.generate(prompt, max_new_tokens=40, do_sample=False)[0]
    print(f"{label}: {tokenizer.decode(ids, skip_special_tokens=True)}\n")

# %% [markdown]
# One seed and thirty steps. The README has longer runs with their spread, and what it costs to go to one bit.
