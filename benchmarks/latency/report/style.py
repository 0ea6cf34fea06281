"""Style sheet of the HTML report.

Stages use the colors of Okabe and Ito, "Color universal design" (2008), which color-blind people can distinguish.
"""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --ink: #1b2230; --muted: #5a6475; --line: #dfe3ea;
  --data: #0072b2; --area: #0072b233; --roofline: #b84a00; --warn: #fff2dc; --warn-line: #d98200;
  --blue: #0072b2; --gray: #b3b9c4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10141b; --card: #191f29; --ink: #e8ecf3; --muted: #9da8ba; --line: #313a48;
    --data: #56b4e9; --area: #56b4e940; --roofline: #ff9a52; --warn: #33270f; --warn-line: #e69f00;
    --blue: #2c8fce; --gray: #7d8797;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 1120px; padding: 28px 20px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 19px; margin: 36px 0 12px; }
h3 { font-size: 15px; margin: 0 0 10px; }
p { margin: 0 0 8px; }
a { color: inherit; text-decoration-color: var(--muted); text-underline-offset: 3px; }
.muted, figcaption { color: var(--muted); }
figcaption, .note { font-size: 13px; margin: 6px 0 0; }
.card, details { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px; }
.warning {
  background: var(--warn); border: 1px solid var(--warn-line); border-radius: 12px; padding: 10px 16px;
  margin: 16px 0 0;
}
.badge {
  background: var(--warn); border: 1px solid var(--warn-line); border-radius: 99px; padding: 1px 9px;
  font-size: 12px; font-weight: 400; white-space: nowrap; display: inline-block;
}
.headline { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin: 0 0 14px; }
.headline .name { color: var(--muted); font-size: 13px; }
.headline .value { font-size: 26px; font-weight: 650; line-height: 1.25; }
.headline .note { margin: 2px 0 0; color: var(--muted); }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; margin: 14px 0; }
.charts > * { min-width: 0; }
.charts > :last-child:nth-child(odd) { grid-column: 1 / -1; }
figure { margin: 0; }
details { margin: 0 0 14px; }
details > summary { cursor: pointer; font-weight: 600; }
details[open] > summary { margin-bottom: 16px; }
details .card { background: transparent; }
summary .figures { font-weight: 400; color: var(--muted); }

svg.plot, svg.bar { display: block; width: 100%; overflow: visible; }
svg.plot { height: 190px; }
svg.bar { height: 34px; }
.frame { padding: 12px 18px 46px 58px; }
text { font-size: 12px; fill: var(--ink); }
.tick { fill: var(--muted); }
.axis { stroke: var(--muted); }
.grid { stroke: var(--line); }
.column { fill: var(--data); stroke: var(--card); stroke-width: 1; }
path { fill: none; vector-effect: non-scaling-stroke; }
.area { fill: var(--area); }
.curve { stroke: var(--kind, var(--data)); stroke-width: 1.6; stroke-linejoin: round; }
.dashed { stroke-dasharray: 6 4; }
.label { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
line.median { stroke: var(--ink); stroke-width: 1.5; }
line.percentile { stroke: var(--muted); stroke-width: 1.5; stroke-dasharray: 2 3; }
line.roofline { stroke: var(--roofline); stroke-width: 2; stroke-dasharray: 7 4; }
text.roofline { fill: var(--roofline); font-weight: 600; }
.whisker { stroke-width: 2; }
.ring { fill: none; stroke: var(--kind); stroke-width: 2; }
.segment { stroke: var(--card); stroke-width: 1; }
.foot { fill: var(--ink); stroke: var(--card); stroke-width: 1; }
.inside { text-anchor: middle; fill: #10141b; font-weight: 600; }
.on-blue { fill: #ffffff; }
.segment { fill: var(--kind); }
.whisker { stroke: var(--kind); }
.orange { --kind: #e69f00; } .sky { --kind: #56b4e9; } .green { --kind: #009e73; } .yellow { --kind: #f0e442; }
.blue { --kind: var(--blue); } .red { --kind: #d55e00; } .pink { --kind: #cc79a7; } .gray { --kind: var(--gray); }
.row { display: flex; justify-content: space-between; gap: 12px; margin: 10px 0 4px; }
.row b { white-space: nowrap; }
.legend {
  display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 12px 0 0; padding: 0; list-style: none; font-size: 13px;
}
.swatch {
  display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; vertical-align: -1px;
  background: var(--kind);
}
.swatch.line { height: 4px; vertical-align: 3px; border-radius: 0; background: var(--ink); }

table { width: 100%; border-collapse: collapse; }
th { text-align: left; font-weight: 500; color: var(--muted); font-size: 13px; }
th, td { padding: 7px 10px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
tbody th { color: var(--ink); font-size: 15px; }
.stages th, .stages td { padding-block: 5px; }
.stages td, .stages thead th:not(:first-child) { text-align: right; }
.cases { table-layout: fixed; }
.cases thead th:first-child { width: 36%; }
.track { height: 7px; margin-top: 4px; background: var(--line); border-radius: 4px; overflow: hidden; }
.track > div { height: 100%; background: var(--data); border-radius: 4px; }
.meter { margin: 0 0 14px; }
.meter .track > div { background: var(--roofline); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; }
pre { white-space: pre-wrap; margin: 0; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
footer { margin-top: 24px; font-size: 13px; color: var(--muted); }

@media (max-width: 860px) { .headline { grid-template-columns: 1fr 1fr; } }
@media (max-width: 600px) {
  body { padding: 18px 12px 36px; }
  .card, details { padding: 14px; }
  details .card { border: 0; padding: 0; margin-top: 12px; }
  .charts { grid-template-columns: 1fr; }
  .headline { gap: 10px; }
  .headline .card, details .headline .card { border: 1px solid var(--line); padding: 10px 12px; margin: 0; }
  .headline .value { font-size: 22px; }
  .frame { padding: 12px 8px 46px 50px; }
  table, tbody { display: block; }
  thead { display: none; }
  tr {
    display: grid; grid-template-columns: 1fr 1fr; gap: 4px 14px; padding: 10px 0;
    border-bottom: 1px solid var(--line);
  }
  tr:last-child { border-bottom: 0; }
  tr > * { display: block; padding: 0; border: 0; }
  tbody th { grid-column: 1 / -1; }
  .stages tr { grid-template-columns: repeat(4, 1fr); gap: 2px 8px; padding: 7px 0; }
  .stages td { text-align: left; padding: 0; }
  td::before { content: attr(data-name); display: block; font-size: 12px; font-weight: 400; color: var(--muted); }
}
"""
