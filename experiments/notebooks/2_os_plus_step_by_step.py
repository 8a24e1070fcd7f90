# %% [markdown]
# # 2. OS+ step by step
#
# Outlier Suppression+ (arXiv 2304.09145) in five short steps on one real tensor: **shift**, **scale**, **search**,
# **fold**, **proof**. The tensor is what a LayerNorm of MiniLM-L6 hands to its feed-forward layer.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from calib.solvers import midpoint, scale_for, search_exhaustive
from model_zoo import load_model

torch.set_num_threads(1)
shared = Path("../../../shared")
model, tokenizer = load_model(shared / "models/minilm-l6-sst2", progress=False)
lines = (shared / "data/sst2/train.tsv").read_text().splitlines()[1:33]
batch = tokenizer([line.split("\t")[0] for line in lines], return_tensors="pt", padding=True)
layer = model.bert.encoder.layer[2]
norm, linear, caught = layer.attention.output.LayerNorm, layer.intermediate.dense, []
handle = norm.register_forward_hook(lambda _, args, out: caught.append((args[0].detach(), out.detach())))
with torch.no_grad():
    model(**batch)
handle.remove()
real = batch["attention_mask"].bool()
before_norm, x = (each[real] for each in caught[0])
print(f"x: {len(x)} tokens x {x.shape[1]} channels, from {x.min():.2f} to {x.max():.2f}")

# %% [markdown]
# **Step 1: shift.** Each channel moves to the middle of its own range, $z_j = (\max_t x_{tj} + \min_t x_{tj}) / 2$
# (eq. 5 of the paper). The tensor's range falls to that of the widest single channel.

# %%
z = midpoint(x.amin(0), x.amax(0))
fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True)
for ax, values, title in ((axes[0], x, "before"), (axes[1], x - z, "after the shift")):
    ax.vlines(range(x.shape[1]), values.amin(0), values.amax(0), linewidth=0.8, color="tab:orange")
    ax.set(title=f"{title}: {values.min():.1f} to {values.max():.1f}", xlabel="channel")
axes[0].set_ylabel("value")
plt.show()
print(f"width of the range: {x.max() - x.min():.2f} -> {(x - z).max() - (x - z).min():.2f}")

# %% [markdown]
# **Step 2: scale.** Channels beyond a threshold $t$ are divided down to it, all others stay as they are: $s_j =
# \max(1, \max_t |x_{tj} - z_j| / t)$ (eq. 8). The weights of the next linear take the factor.

# %%
absmax = (x - z).abs().amax(0)
fig, ax = plt.subplots(figsize=(8, 2.6))
order = absmax.sort(descending=True).values
ax.plot(order, label="shifted", color="black")
for t in (3.0, 1.5):
    s = scale_for(absmax, t)
    ax.plot((absmax / s).sort(descending=True).values, label=f"scaled, t = {t}")
ax.set(xlabel="channels, the largest first", ylabel="largest magnitude")
ax.legend()
plt.show()

# %% [markdown]
# **Step 3: search.** A small $t$ leaves a fine grid for activations and moves the difficulty into the weights. What
# counts is the linear's *output*, so every threshold is tried, with both sides rounded: 6 bits, one range for $x$,
# one per row for $W$.


# %%
def rounded(values, bits, dim=None):
    """Round to nearest on a symmetric grid: one range, or one per row."""
    top = values.abs().amax() if dim is None else values.abs().amax(dim, keepdim=True)
    step = top / (2 ** (bits - 1) - 1)
    return (values / step).round() * step


weight, bias = linear.weight.detach(), linear.bias.detach()
wanted = x @ weight.T
shifted = x - z


def loss(s):
    """Squared error of the output with both sides rounded; the shift's part, z W^T, is exact and cancels."""
    out = rounded(shifted / s, 6) @ rounded(weight * s, 6, dim=1).T
    return float((out - shifted @ weight.T).square().sum(1).mean())


found = search_exhaustive(absmax, loss, torch.linspace(float(absmax.max()), 0.4, 80).tolist())
plain = float((rounded(x, 6) @ rounded(weight, 6, dim=1).T - wanted).square().sum(1).mean())
curve = [(t, value) for t, value in found.curve if t < float("inf")]
fig, ax = plt.subplots(figsize=(8, 3))
ax.plot(*zip(*curve, strict=True), "o-", markersize=3)
ax.plot(found.threshold, found.loss, "o", markersize=11, fillstyle="none", color="tab:red", label="taken")
ax.axhline(plain, color="tab:orange", linestyle="--", label="neither shift nor scale")
ax.axhline(found.identity_loss, color="gray", linestyle=":", label="shift alone")
ax.set(xlabel="threshold t", ylabel="squared error of the output", yscale="log")
ax.legend()
plt.show()
print(f"error: plain {plain:.3f}, shifted {found.identity_loss:.3f}, shifted and scaled {found.loss:.3f}")
print(f"threshold {found.threshold:.2f}: {int((found.scale > 1).sum())} of {len(found.scale)} channels scaled")

# %% [markdown]
# **Step 4: fold.** Nothing of this may cost time later. The LayerNorm's own gain and bias take the shift and scale,
# the linear takes them back: $\gamma \leftarrow \gamma / s$, $\beta \leftarrow (\beta - z) / s$, $W \leftarrow
# W\,\mathrm{diag}(s)$, $b \leftarrow b + W z$ with the unscaled $W$.

# %%
s = found.scale.double()
gain, offset = norm.weight.double(), norm.bias.double()
new_gain, new_offset = gain / s, (offset - z.double()) / s
new_weight, new_bias = weight.double() * s, bias.double() + weight.double() @ z.double()


def normed(h, g, b):
    return torch.nn.functional.layer_norm(h.double(), (h.shape[1],), g, b, norm.eps)


moved = normed(before_norm, new_gain, new_offset).detach()
print(f"the norm now gives {moved.min():.2f} to {moved.max():.2f}, where it gave {x.min():.2f} to {x.max():.2f}")

# %% [markdown]
# **Step 5: proof.** In exact arithmetic nothing changed. `calib` checks this after every fold, on real input, and
# undoes a fold that fails.

# %%
old = (normed(before_norm, gain, offset) @ weight.double().T + bias.double()).detach()
new = moved @ new_weight.T + new_bias
print(f"relative difference of the outputs: {float(((new - old).norm() / old.norm()).detach()):.1e}")

fig, axes = plt.subplots(1, 2, figsize=(9, 2.8))
for ax, values, colour, title in (
    (axes[0], x, "tab:orange", "before"),
    (axes[1], moved, "tab:blue", "after (mind the scale)"),
):
    ax.vlines(range(x.shape[1]), values.amin(0), values.amax(0), linewidth=0.8, color=colour)
    ax.set(title=f"what the norm gives, {title}", xlabel="channel")
plt.show()

# %% [markdown]
# One caveat that this page hides: MiniLM is a *post-norm* model, so the residual connection reads the same tensor.
# There `calib` leaves the tensor as it is and puts $(x - z) / s$ into the linear's input quantizer, which is
# elementwise anyway. In models that normalise first (LLaMA, OPT, BLOOM) the fold above is all there is.
