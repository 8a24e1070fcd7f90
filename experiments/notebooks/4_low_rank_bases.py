# %% [markdown]
# # 4. Low-rank bases
#
# A weight matrix can be kept as a product of two thin ones. *Which* thin ones decides everything: the best
# approximation of the weight is not the best approximation of what the layer does.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import calib
from calib.solvers import InputStatistics, bases
from model_zoo import load_model

torch.set_num_threads(1)
shared = Path("../../../shared")
model, tokenizer = load_model(shared / "models/minilm-l6-sst2", progress=False)
lines = (shared / "data/sst2/train.tsv").read_text().splitlines()[1:]
name, caught = "bert.encoder.layer.3.output.dense", []


def inputs(texts):
    """What enters the linear, [tokens, channels]."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return caught.pop()[batch["attention_mask"].bool()].double()


texts = [line.split("\t")[0] for line in lines[:320]]
x, fresh = inputs(texts[:256]), inputs(texts[256:])  # fresh: judges, never seen by a choice
weight = model.get_submodule(name).weight.detach().double()
print(f"{name}: {tuple(weight.shape)}, {len(x)} tokens to choose on, {len(fresh)} to judge on")

# %% [markdown]
# **The metric.** Every published scaling is a metric $M$ on the layer's inputs; the best bases are the leading
# eigenvectors of $W M W^\top$. With $M = I$ it is the plain SVD; with $M = E[x x^\top]$ each eigenvalue is exactly
# the output energy that dropping its basis costs.

# %%
statistics = InputStatistics(gram=x.T @ x / len(x), absmean=x.abs().mean(0))
variants = {"svd": "weight alone", "asvd": "channel magnitudes", "whitened": "whole input statistics"}
found = {variant: bases(weight, statistics.metric(variant)) for variant in variants}
ranks = [8, 16, 32, 64, 96, 128, 192, 256, 320, 384]
energy = (fresh @ weight.T).square().sum()
lost = {}
for variant, each in found.items():
    out = [fresh @ (weight - each.up[:, :r] @ each.down[:r]).T for r in ranks]
    lost[variant] = [float(part.square().sum() / energy) for part in out]

fig, ax = plt.subplots(figsize=(8, 3.2))
for variant, label in variants.items():
    ax.plot(ranks[:-1], lost[variant][:-1], "o-", label=f"{variant}: {label}")
even = weight.shape[0] * weight.shape[1] / sum(weight.shape)
ax.axvline(even, color="gray", linestyle=":", label="beyond this, factors are no smaller")
ax.set(xlabel="rank kept", ylabel="output energy lost, fresh text", yscale="log")
ax.legend(fontsize=8)
plt.show()
at = ranks.index(128)
print("lost at rank 128: " + ", ".join(f"{variant} {losses[at]:.1%}" for variant, losses in lost.items()))

# %% [markdown]
# **The price list.** What each basis adds to the output, in the order in which the variant would keep them: the SVD's
# order is not the one that matters. A steep curve means the layer gives up many bases cheaply. Layers differ, which
# is why `calib` chooses ranks over all of them under one budget.

# %%
fig, ax = plt.subplots(figsize=(8, 2.8))
for variant in ("svd", "whitened"):
    each = found[variant]
    paid = torch.stack([(x @ each.down[k]).square().mean() for k in range(len(each.energy))])
    ax.semilogy(paid / paid.sum(), label=variant, alpha=0.8)
ax.set(xlabel="basis, in the order of the variant", ylabel="share of the output energy")
ax.legend()
plt.show()

# %% [markdown]
# **In one call**, on a language model this time: stories260k (0.26 million parameters), which writes its own
# calibration text. A fifth of its weights' parameters is taken away, twice. So small a model has little to spare.

# %%
stories = shared / "models/stories260k"
losses = {}
for variant in ("svd", "whitened"):
    result = calib.quantize(
        stories, "none", f"low_rank:{variant}", "self", keep=0.8, samples=32, seq_len=128, progress=False
    )
    quality = result.report["quality"]
    losses |= {"float": quality["float"], variant: quality["quantized"]}
fig, ax = plt.subplots(figsize=(6, 2.2))
ax.barh(list(losses), list(losses.values()), color=["gray", "tab:orange", "tab:blue"])
ax.set(xlabel="perplexity on held-out text, logarithmic", xscale="log", xlim=(1, None))
ax.invert_yaxis()
plt.show()
print(", ".join(f"{label} {value:.2f}" for label, value in losses.items()))
