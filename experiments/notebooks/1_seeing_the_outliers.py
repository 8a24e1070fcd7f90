# %% [markdown]
# # 1. Seeing the outliers
#
# Why does rounding a transformer to eight bits go wrong at all? Because a few channels are much larger than the rest,
# and one grid has to hold them all. We look at one real model: MiniLM-L6, fine-tuned to tell good reviews from bad.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm

import calib
from model_zoo import load_model

torch.set_num_threads(1)
shared = Path("../../../shared")
model, tokenizer = load_model(shared / "models/minilm-l6-sst2", progress=False)
lines = (shared / "data/sst2/train.tsv").read_text().splitlines()[1:17]
batch = tokenizer([line.split("\t")[0] for line in lines], return_tensors="pt", padding=True)
real = batch["attention_mask"].bool()  # padding never counts

# %% [markdown]
# A *site* is a tensor that feeds linears. We record the input of every linear of every layer in one pass.

# %%
seen = {}
handles = [
    module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0][real].detach()))
    for name, module in model.named_modules()
    if isinstance(module, torch.nn.Linear) and ".layer." in name
]
with torch.no_grad():
    model(**batch)
for handle in handles:
    handle.remove()

size = {name: x.abs().amax(0) for name, x in seen.items()}  # each channel's largest magnitude
ratio = {name: float(each.max() / each.median()) for name, each in size.items()}
normed = [name for name in ratio if name.endswith(("self.query", "intermediate.dense"))]  # a LayerNorm feeds these
worst = max(normed, key=ratio.get)
print(f"{len(seen)} linears, {int(real.sum())} tokens")
print(f"most uneven input that a LayerNorm gives: {worst}")
print(f"largest channel {size[worst].max():.2f}, median channel {size[worst].median():.2f}: {ratio[worst]:.0f} times")

# %% [markdown]
# **The map.** One row a token, one column a channel. Two things stand out. Dark rows with one very bright point: the
# token that opens each sentence keeps nearly all of its magnitude in a single channel. And faint vertical lines: a
# few channels that are large at every token.

# %%
x = seen[worst][:40]
fig, ax = plt.subplots(figsize=(8, 3))
image = ax.imshow(x.abs().clamp(min=1e-2), aspect="auto", cmap="inferno", norm=LogNorm(), interpolation="nearest")
ax.set(xlabel="channel", ylabel="token", title="magnitude of the input")
fig.colorbar(image, label="|x|")
plt.show()

# %% [markdown]
# **The ranges.** The smallest and largest value of each channel. Most outliers lie on one side of zero: moving such a
# channel to its middle halves what a grid has to hold, before anything is scaled. That is the idea of OS+ (notebook
# 2).

# %%
lo, hi = seen[worst].amin(0), seen[worst].amax(0)
fig, ax = plt.subplots(figsize=(8, 2.8))
ax.vlines(range(len(lo)), lo, hi, color="tab:orange", linewidth=0.9)
ax.set(xlabel="channel", ylabel="value", title="smallest to largest value of each channel")
plt.show()
channel = int((-lo).maximum(hi).argmax())
print(f"channel {channel}: from {lo[channel]:.2f} to {hi[channel]:.2f}")

# %% [markdown]
# **What it costs.** One range for the whole tensor means one step size. How many of the 256 steps does an ordinary
# channel get to use?

# %%
step = float(hi.max() - lo.min()) / 255
used = (hi - lo) / step
fig, ax = plt.subplots(figsize=(8, 2.6))
ax.hist(used.numpy(), bins=60, color="tab:blue")
ax.axvline(float(used.median()), color="black", linestyle="--", label=f"median: {used.median():.0f} of 256")
ax.set(xlabel="steps of the grid that a channel uses", ylabel="channels")
ax.legend()
plt.show()
print(f"at 8 bits the median channel uses {used.median():.0f} steps, at 6 bits {used.median() / 4:.1f}")

# %% [markdown]
# **Everywhere?** The ratio of the largest to the median channel at each input. Where it is high, low bits will hurt.
# The inputs of `output.dense` come out of a GELU: their outliers are one-sided, and no norm is there to absorb
# anything.

# %%
fig, ax = plt.subplots(figsize=(8, 3))
for kind in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"):
    names = [n for n in ratio if n.endswith(f"layer.{n.split('.layer.')[1].split('.')[0]}.{kind}")]
    ax.plot([ratio[n] for n in names], "o-", label=f"input of {kind}")
ax.set(xlabel="layer", ylabel="largest / median channel", yscale="log")
ax.set_yticks([3, 5, 10, 20, 30], ["3", "5", "10", "20", "30"], minor=False)
ax.minorticks_off()
ax.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plt.show()

# %% [markdown]
# `calib.inspect` says the same in one call, for any model, with what could absorb a shift and a scale at each place
# (`calib inspect MODEL --html page.html` draws it).

# %%
texts = [line.split("\t")[0] for line in lines]
report = calib.inspect(model, texts, tokenizer=tokenizer, samples=8, seq_len=64, progress=False)
for site in sorted(report["sites"], key=lambda s: -s["outliers"]["ratio"])[:4]:
    print(f"{site['name']:52s} {site['outliers']['ratio']:6.1f} x   {site['fold'] or site['note']}")
