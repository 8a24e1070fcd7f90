# %% [markdown]
# # 3. Choosing calibration data
#
# Calibration looks at a few hundred texts and fixes ranges from them. Which texts? Those that look like the
# application's. Here a pool of four kinds of text, a handful of examples, and a draw that finds more of their kind.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import calib
from calib.solvers import InputStatistics, bases
from model_zoo import load_model

torch.set_num_threads(1)
data = Path("../../../shared/data")
reviews = [line.split("\t")[0] for line in (data / "sst2/dev.tsv").read_text().splitlines()[1:2001]]
news = [line for line in (data / "wikitext-2/valid.txt").read_text().splitlines() if len(line) > 80][:600]
maths = [json.loads(line)["question"] for line in (data / "gsm8k/test.jsonl").read_text().splitlines()[:700]]
code = [json.loads(line)["code"] for line in (data / "mbpp/mbpp.jsonl").read_text().splitlines()[:700]]
kinds = {"reviews": reviews[200:], "encyclopaedia": news, "maths": maths, "code": code}
kind_of = {text.strip(): kind for kind, texts in kinds.items() for text in texts}
pool = [text for texts in kinds.values() for text in texts]
target = reviews[:200]  # our examples; not in the pool
print({kind: len(texts) for kind, texts in kinds.items()}, f"{len(target)} examples")

# %% [markdown]
# `calib.data.select` counts hashed words (and, with a tokenizer, subwords and longer pieces), weighs each text by how
# much likelier it is under the examples than under the pool, and draws without replacement. A quarter is drawn
# evenly, for what the examples do not show.

# %%
chosen = calib.data.select(pool, target, windows=8, seq_len=256, features=["word"], seed=0)
even = calib.data.select(pool, target, windows=8, seq_len=256, features=["word"], uniform=1.0, seed=0)


def shares(texts):
    """The share of each kind, by characters."""
    total = dict.fromkeys(kinds, 0)
    for text in texts:
        total[kind_of.get(text.strip(), "encyclopaedia")] += len(text)
    return {kind: size / sum(total.values()) for kind, size in total.items()}


drawn = {"pool": shares(pool), "drawn evenly": shares(even.texts), "chosen": shares(chosen.texts)}
fig, ax = plt.subplots(figsize=(8, 2.4))
left = [0.0] * len(drawn)
for kind in kinds:
    widths = [share[kind] for share in drawn.values()]
    ax.barh(list(drawn), widths, left=left, label=kind)
    left = [a + b for a, b in zip(left, widths, strict=True)]
ax.set(xlabel="share of the text", xlim=(0, 1))
ax.invert_yaxis()
ax.legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plt.show()
print(f"reviews: {drawn['pool']['reviews']:.0%} of the pool, {drawn['chosen']['reviews']:.0%} of what was chosen")

# %% [markdown]
# Does it matter? Most where statistics decide *what is kept*. Take one linear of a review classifier down to rank 64,
# with the bases chosen on 1,500 tokens of each kind of text, and look at the output that reviews of the test set lose
# (notebook 4 has the method).

# %%
model, tokenizer = load_model("../../../shared/models/minilm-l6-sst2", progress=False)
linear = model.get_submodule("bert.encoder.layer.3.output.dense")
weight, caught = linear.weight.detach().double(), []


def inputs(texts, tokens=1500):
    """What enters the linear, [tokens, channels]."""
    handle, rows = linear.register_forward_pre_hook(lambda _, args: caught.append(args[0])), []
    for i in range(0, len(texts), 16):
        batch = tokenizer(texts[i : i + 16], return_tensors="pt", padding=True, truncation=True, max_length=64)
        with torch.no_grad():
            model(**batch)
        rows.append(caught.pop()[batch["attention_mask"].bool()])
        if sum(map(len, rows)) >= tokens:
            break
    handle.remove()
    return torch.cat(rows)[:tokens].double()


fresh = inputs([line.split("\t")[0] for line in (data / "sst2/test.tsv").read_text().splitlines()[1:]])
lost = {}
for kind, texts in {**kinds, "drawn evenly": even.texts, "chosen": chosen.texts}.items():
    x = inputs(texts)
    kept = bases(weight, InputStatistics(gram=x.T @ x / len(x), absmean=x.abs().mean(0)).metric("whitened"))
    rest = weight - kept.up[:, :64] @ kept.down[:64]
    lost[kind] = float((fresh @ rest.T).square().sum() / (fresh @ weight.T).square().sum())
    print(f"{kind:14s} {len(x)} tokens, {lost[kind]:.1%} of the output energy on test reviews lost")

# %%
fig, ax = plt.subplots(figsize=(8, 2.6))
colours = {"reviews": "tab:green", "chosen": "tab:blue"}
ax.barh(list(lost), list(lost.values()), color=[colours.get(kind, "lightgray") for kind in lost])
ax.set(xlabel="output energy lost on test reviews, rank 64 of 384")
ax.invert_yaxis()
plt.show()

# %% [markdown]
# One linear, one draw: read the direction, not the digits; the README has more. In one argument, the same choice is
# `calib.quantize(..., data=calib.data.like(target="examples.jsonl", pool="crawl/"))`.
