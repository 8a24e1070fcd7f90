"""Is one threshold with a power of one the right family of scales, and is clipping worth a joint search?

    python -m experiments.accuracy.families [--blocks 4] [--schemes w8a8-static,w4a4-static]

At the sites of SmolLM2's first blocks, as os+ meets them, the exact loss of its pick is compared with the best of:
blend (max(1, a_j / t)^alpha), groups (a threshold of its own for each quarter of the channels, found in one round of
coordinate descent from the pick), and a clipped input range, c times the extremes: chosen after t, or together with it.
A figure below 1 is a gain over os+'s pick. 16 x 512 tokens of WikiText-2's validation text; families.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

import calib
from calib.methods import ShiftScale, SiteView
from calib.methods.os_plus import OSPlus
from calib.recipe import Recipe
from calib.solvers import objective
from calib.solvers.os_plus import fast_grid, scale_for
from experiments.bench.search import first_windows
from model_zoo import sources

HERE = Path(__file__).parent
ALPHAS, CLIPS, GROUPS, FACTORS = (0.5, 0.7, 0.85), (0.95, 0.9, 0.8, 0.7, 0.5), 4, (0.5, 0.7, 1.4, 2.0)
EVERY, SCORED = 4, 4  # of the grid's thresholds; scored exactly


class Clipped(objective.InputCodes):
    """Codes of a range c times as wide as the extremes."""

    factor = 1.0

    def __init__(self, spec: Any, lo: Tensor, hi: Tensor, scale: Tensor) -> None:
        super().__init__(spec, lo * self.factor, hi * self.factor, scale)


def best(few: Any, many: Any, scales: list[Tensor]) -> float:
    """The least exact loss of the best ranked."""
    return min(many(scale) for scale in sorted(scales, key=few)[:SCORED])


def compare(site: SiteView, found: ShiftScale) -> dict[str, float]:
    """Each family's best loss over the pick's."""
    z = 0.0 if found.shift is None else found.shift
    absmax = torch.maximum(-(site.lo - z), site.hi - z)
    pick = torch.ones_like(absmax) if found.scale is None else found.scale
    few, many = site.objective(found.shift, found.hadamard)
    base = many(pick)
    thresholds = fast_grid(absmax)[::EVERY]
    row = {f"blend {a}": best(few, many, [scale_for(absmax, t) ** a for t in thresholds]) / base for a in ALPHAS}
    current, loss = pick.clone(), base
    for group in torch.arange(len(absmax)).tensor_split(GROUPS):
        for factor in FACTORS:
            other = current.clone()
            other[group] = scale_for(absmax[group], found.detail["threshold"] * factor)
            if torch.isfinite(other).all() and (score := many(other)) < loss:
                current, loss = other, score
    row["groups"] = loss / base
    after, joint = [base], [base]
    for Clipped.factor in CLIPS:
        few, many = site.objective(found.shift, found.hadamard)
        after.append(many(pick))
        joint += [after[-1], best(few, many, [scale_for(absmax, t) for t in thresholds])]
    Clipped.factor = 1.0
    return {**row, "clipped after": min(after) / base, "clipped jointly": min(joint) / base}


def run(scheme: str, blocks: int) -> list[dict[str, Any]]:
    model, tokenizer = sources.load_model(sources.resolve("smollm2-135m", progress=False), progress=False)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:blocks], blocks
    rows, solve = [], OSPlus.solve

    def compared(self: OSPlus, site: SiteView, recipe: Recipe) -> ShiftScale:
        found = solve(self, site, recipe)
        if "threshold" in found.detail:
            rows.append({"site": site.name, **compare(site, found)})
            print(scheme, site.name, {k: round(v, 3) for k, v in rows[-1].items() if k != "site"}, flush=True)
        return found

    with (
        mock.patch.object(OSPlus, "solve", compared),
        mock.patch.object(objective, "InputCodes", Clipped),
        mock.patch("calib.engine.context.InputCodes", Clipped),
    ):
        data = first_windows(tokenizer, 16)
        calib.quantize(model, scheme, "os+", data, tokenizer=tokenizer, samples=16, seq_len=512, progress=False)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--schemes", default="w8a8-static,w4a4-static")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "settings": {"blocks": options.blocks, "windows": 16, "length": 512},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "calib": calib.__version__},
    }
    for scheme in options.schemes.split(","):
        rows = run(scheme, options.blocks)
        names = [name for name in rows[0] if name != "site"]
        mean = {name: statistics.geometric_mean(row[name] for row in rows) for name in names}
        gains = {name: sum(row[name] < 0.99 for row in rows) for name in names}
        report[scheme] = {"sites": rows, "geometric_mean": mean, "sites_gaining_a_percent": gains}
        print(f"{scheme}: {len(rows)} sites; geometric mean {mean}; by over 1 % at {gains}")
    (HERE / "families.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
