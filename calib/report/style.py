"""The page's looks: two themes, one column on a phone. Colours mean the same everywhere (before, after, shift)."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --card: #f6f7f9; --ink: #1a1e24; --soft: #59636e; --edge: #d5dae0;
  --before: #c2540a; --after: #1763d6; --shift: #8432e0; --mark: #b42318;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0e1217; --card: #171c23; --ink: #e7eaee; --soft: #a0a9b4; --edge: #323a44;
    --before: #f5904a; --after: #62a5ff; --shift: #c79bff; --mark: #ff8b80;
  }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; max-width: 1240px; padding: 20px 16px 60px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 4px }
h2 { font-size: 1.2rem; margin: 40px 0 6px }
h3 { font-size: 1rem; margin: 26px 0 0 }
p { margin: 2px 0 10px; max-width: 80ch }
li { max-width: 100ch }
.soft, .note { color: var(--soft) }
.note { font-size: .82rem; line-height: 1.4; margin: 4px 0 0 }
.tiles, .grid-of { display: grid; gap: 12px; align-items: start }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); margin: 16px 0; align-items: stretch }
.grid-of { grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); max-width: 1240px }
.tile, figure, pre { background: var(--card); border-radius: 8px; padding: 12px 14px }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3 }
.tile span { color: var(--soft); font-size: .85rem; display: block; line-height: 1.4 }
figure { margin: 0; max-width: 560px }
figcaption { font-weight: 600; font-size: .92rem; margin: 0 0 6px }
svg { display: block; width: 100%; height: auto }
svg text { font-size: 12.5px; fill: var(--soft); font-family: inherit }
svg .label, svg .heading, svg .name { fill: var(--ink) }
image { image-rendering: pixelated }
svg .grid, svg .tick, svg .axis { stroke: var(--edge); fill: none }
svg .line { fill: none; stroke-width: 1.8 }
.before { fill: var(--before); stroke: none }
.after { fill: var(--after); stroke: none }
.line.before { stroke: var(--before); fill: none }
.line.after { stroke: var(--after); fill: none }
.line.shift { stroke: var(--shift); stroke-width: 2 }
.line.whisker { stroke: var(--soft); stroke-width: 1 }
.dashed { stroke-dasharray: 5 4 }
.ring { fill: none; stroke: var(--mark); stroke-width: 2.2 }
i.before, i.after, i.shift {
  display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 .5em;
}
i.before { background: var(--before) }
i.after { background: var(--after) }
i.shift { background: var(--shift) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .84rem; overflow-wrap: normal }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--edge); vertical-align: top }
th { color: var(--soft); font-weight: 600 }
code, pre { font: .84rem/1.5 ui-monospace, "Liberation Mono", monospace }
pre { white-space: pre-wrap; margin: 6px 0 }
details { margin: 10px 0 }
summary { cursor: pointer; font-weight: 600; padding: 4px 0 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; font-size: .88rem }
dt { color: var(--soft) }
dd { margin: 0 }
@media (max-width: 520px) {
  dl { grid-template-columns: 1fr }
  dd { margin: 0 0 6px }
}
"""
