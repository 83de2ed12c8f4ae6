"""The look of `report.html`: one style sheet, for light and dark, without anything from elsewhere."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1d2329; --soft: #5d6772; --rule: #e1e4e8; --faint: #eef0f2;
  --before: #b4bcc6; --after: #2563b8; --gemm: #2563b8; --conv2d: #c2560c; --attention: #15803d; --rmsnorm: #9333ea;
  --other: #6b7280; --good: #15803d; --warn: #a15c07; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181c; --card: #1b2026; --ink: #e3e7eb; --soft: #9aa5b1; --rule: #2f363e; --faint: #232930;
  --before: #566270; --after: #6ea8f7; --gemm: #6ea8f7; --conv2d: #f59e54; --attention: #58c27d; --rmsnorm: #c690f5;
  --other: #9ca3af; --good: #58c27d; --warn: #e3aa4e; --bad: #f28080; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 10px; padding-bottom: 6px; border-bottom: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 6px 0 12px; max-width: 78ch; }
.soft, .lead { color: var(--soft); }
code { font: 12.5px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  overflow-wrap: anywhere; }
pre { background: var(--faint); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px;
  overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 12px; margin: 22px 0 8px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 13px 16px; }
.tile .name { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 17px; font-weight: 600; line-height: 1.35; font-variant-numeric: tabular-nums; }
.tile .more { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 46%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; font-size: 12.5px; padding: 5px 14px 5px 0;
  border-bottom: 1px solid var(--rule); vertical-align: bottom; }
td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--faint); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.t { white-space: nowrap; }
table.wide { width: 100%; }
td.bars { width: 38%; min-width: 170px; padding-top: 8px; }
td.name { max-width: 330px; }
tr:last-child td { border-bottom: 0; }
.bar { display: block; width: 100%; height: 8px; margin-bottom: 2px; overflow: visible; }
.bar .before, .key .before { fill: var(--before); background: var(--before); }
.bar .after, .key .after { fill: var(--after); background: var(--after); }
.badge { display: inline-block; font-size: 11px; line-height: 16px; padding: 0 6px; border-radius: 8px;
  min-width: 78px; text-align: center;
  border: 1px solid currentColor; color: var(--soft); vertical-align: 1px; white-space: nowrap; }
.badge.measured { color: var(--good); } .badge.transferred { color: var(--after); }
.badge.predicted { color: var(--warn); }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.note-box { border-left: 3px solid var(--warn); background: var(--faint); padding: 9px 14px; border-radius: 0 8px 8px 0;
  margin: 12px 0; max-width: none; }
.note-box.failed { border-color: var(--bad); }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); margin: 4px 0 10px; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
.key i.round { border-radius: 50%; }
.key i.gemm { background: var(--gemm); } .key i.conv2d { background: var(--conv2d); }
.key i.attention { background: var(--attention); } .key i.rmsnorm { background: var(--rmsnorm); }
.key i.other { background: var(--other); } .key i.hollow { border: 2px solid var(--soft); background: none; }
.key i.full { background: var(--soft); }
.plot { display: block; width: 100%; height: auto; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; font-size: 12px; }
.plot text { fill: var(--soft); font-family: inherit; } .plot .axis { fill: var(--ink); font-size: 13px; }
.plot .grid { stroke: var(--faint); stroke-width: 1; } .plot .roof { stroke: var(--soft); stroke-width: 1.6; }
.plot .mark { stroke-width: 1.6; fill-opacity: .75; stroke: var(--other); fill: var(--other); }
.plot .gemm { stroke: var(--gemm); fill: var(--gemm); } .plot .conv2d { stroke: var(--conv2d); fill: var(--conv2d); }
.plot .attention { stroke: var(--attention); fill: var(--attention); }
.plot .rmsnorm { stroke: var(--rmsnorm); fill: var(--rmsnorm); }
.plot .chosen { stroke: var(--good); fill: var(--good); }
.plot .hollow { fill: none; stroke-opacity: .8; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--after); }
@media print { details > * { display: block; } body { background: #fff; } }
"""
