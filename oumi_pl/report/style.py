"""How a report's page looks: light and dark, on a telephone and on a wide screen."""

CSS = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #24292f; --quiet: #59636e; --faint: #a5adb5;
  --edge: #dfe3e7; --code: #f3f4f6; --good: #1a7f37; --bad: #b42318; --warn: #9a6700; --warned: #fff8e1;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b35a8e; --c4: #b87f00; --c5: #3a94c9; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e4e7ea; --quiet: #a3acb5;
  --faint: #6c757d; --edge: #32383e; --code: #23282d; --good: #4ac26b; --bad: #ff7b72; --warn: #e3b341;
  --warned: #2d2716; --c0: #56b4e9; --c1: #f08a4b; --c2: #2fc99b; --c3: #dd95bf; --c4: #e8b23a; --c5: #8fd0f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 10px; }
p { margin: 6px 0; overflow-wrap: anywhere; }
.quiet { color: var(--quiet); }
.small { font-size: 13px; }
.head { display: flex; flex-wrap: wrap; gap: 6px 12px; align-items: center; }
.state { border: 1px solid currentColor; border-radius: 99px; padding: 1px 10px; font-size: 13px; font-weight: 600; }
.finished { color: var(--good); } .failed, .killed { color: var(--bad); } .stopped, .unknown { color: var(--warn); }
.running { color: var(--c0); }
nav { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 12px 0 0; font-size: 14px; }
a { color: var(--c0); }
.note { background: var(--warned); border-left: 4px solid var(--warn); padding: 8px 12px; margin: 10px 0;
  border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere; }
.note.bad { border-color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(158px, 1fr)); gap: 10px; margin: 16px 0; }
.tile, figure, .card { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; }
.tile { padding: 9px 12px; } .tile b { display: block; font-size: 20px; font-weight: 600; line-height: 1.3; }
.tile span { color: var(--quiet); font-size: 13px; }
abbr { text-decoration: underline dotted var(--faint); cursor: help; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 10px; }
figure { margin: 0; padding: 6px 8px 2px; } figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; vertical-align: top; border-bottom: 1px solid var(--edge); }
th { font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
.samples { display: grid; gap: 12px; grid-template-columns: minmax(0, 1fr); } .card { padding: 10px 12px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: 8px 18px;
  margin-top: 8px; border-top: 1px solid var(--edge); padding-top: 8px; }
.label { color: var(--quiet); font-size: 12.5px; }
.bar { display: flex; height: 14px; border-radius: 4px; overflow: hidden; margin: 4px 0 10px; background: var(--edge); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 7px; }
pre { background: var(--code); border-radius: 6px; padding: 10px 12px; overflow-x: auto; margin: 6px 0 12px;
  font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; max-width: 100%; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 8px 0; } summary { cursor: pointer; }
dl { display: grid; grid-template-columns: minmax(90px, max-content) minmax(0, 1fr); gap: 3px 16px;
  margin: 6px 0; font-size: 14px; }
dt { color: var(--quiet); overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; }
.strip { display: block; width: 100%; max-width: 560px; height: 26px; }
@media print { nav { display: none; } details { display: block; } }
"""
