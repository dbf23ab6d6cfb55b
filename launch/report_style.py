"""How the report's page looks: on wide and narrow screens, light and dark, and on paper; no script is needed."""

from poise.launch.report_charts import COLOURS, DARK_COLOURS

_STYLE = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--ink:#1b1d21;--soft:#5c626b;--line:#e2e2dc;--grid:#ecece7;
--mark:#eef3f9;--warn:#8a5300;--warn-page:#fff6e5;--focus:#0b62c4}
*{box-sizing:border-box}
html{scroll-padding-top:5.2rem;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
header,main,footer{max-width:1400px;margin:0 auto;padding:0 clamp(14px,3vw,36px)}
h1{font-size:clamp(1.5rem,3.4vw,2.1rem);line-height:1.2;letter-spacing:-.02em;margin:1.6em 0 .2em;
overflow-wrap:anywhere}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:2.4em 0 .7em}
h3{font-size:1.02rem;margin:1.7em 0 .6em;overflow-wrap:anywhere}
h4{font-size:.8rem;font-weight:600;color:var(--soft);margin:1.3em 0 .6em;text-transform:uppercase;letter-spacing:.06em}
p{margin:.4em 0;max-width:46em}
.soft{color:var(--soft)}
code,pre,.metric{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.92em}
a{color:inherit}
.toggle{position:fixed;top:0;left:0;opacity:0;pointer-events:none}
.bar{position:sticky;top:0;z-index:2;max-width:none;background:color-mix(in srgb,var(--page) 92%,transparent);
backdrop-filter:blur(8px);border-bottom:1px solid var(--line)}
.bar>div{max-width:1400px;margin:0 auto;padding:.55rem clamp(14px,3vw,36px);display:flex;flex-wrap:wrap;
gap:.35rem .5rem;align-items:center}
.bar nav{display:flex;flex-wrap:wrap;gap:0 1rem;margin-left:auto;font-size:.9rem}
.bar nav a{text-decoration:none;color:var(--soft)}
.bar nav a:hover{color:var(--ink);text-decoration:underline}
label{display:inline-flex;align-items:center;gap:.4em;max-width:18em;padding:.16em .7em;border:1px solid var(--line);
border-radius:99px;background:var(--card);font-size:.9rem;cursor:pointer;user-select:none}
label .name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
label.switch::before{content:"";width:.72em;height:.72em;border:1.5px solid var(--soft);border-radius:3px}
.swatch{width:22px;height:10px;flex:none}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:14px}
.card,.chart,.wrap,.shown{background:var(--card);border:1px solid var(--line);border-radius:10px}
.card{padding:.9em 1.1em;border-top:3px solid currentColor}
.card>*{color:var(--ink)}
.card h3{margin:0}
.card .soft{color:var(--soft);overflow-wrap:anywhere;margin-top:0}
dl{display:grid;grid-template-columns:auto 1fr;gap:.1em 1em;margin:.6em 0 0;font-size:.92rem}
dt{color:var(--soft)}
dd{margin:0;text-align:right;overflow-wrap:anywhere}
.notes{list-style:none;margin:1em 0 0;padding:0}
.notes li{color:var(--warn);background:var(--warn-page);border-radius:8px;padding:.45em .8em;margin:.35em 0;
font-size:.92rem;overflow-wrap:anywhere}
.notes b{margin-right:.5em}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:14px}
figure{margin:0}
.chart{padding:.7em .8em .6em}
.chart figcaption{display:flex;gap:.8em;align-items:baseline;justify-content:space-between;margin-bottom:.3em}
.metric{font-weight:600;overflow-wrap:anywhere}
.only-log{display:none;color:var(--soft);font-size:.78rem}
.chart>svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:11px}
svg path{fill:none}
path.grid{stroke:var(--grid);stroke-width:1}
.raw,.smooth{stroke:currentColor;stroke-width:1.5;stroke-linejoin:round}
.smooth{display:none;stroke-width:2}
svg path.band{fill:currentColor;fill-opacity:.16}
.dots{stroke:currentColor;stroke-width:5;stroke-linecap:round}
.log{display:none}
.legend{list-style:none;margin:.35em 0 0;padding:.35em 0 0;border-top:1px solid var(--grid);font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.5em}
.legend .name{color:var(--ink);overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.legend .seeds{color:var(--soft);white-space:nowrap}
.legend .last{color:var(--ink);margin-left:auto;font-weight:600}
.tables{display:flex;flex-wrap:wrap;gap:0 2.2em;align-items:flex-start}
.tables>div{max-width:100%}
.wrap{overflow-x:auto;max-width:100%;width:fit-content;margin:.5em 0 1.1em}
table{border-collapse:collapse;font-size:.92rem}
th,td{padding:.36em .95em;text-align:right;white-space:nowrap;vertical-align:top}
thead th{white-space:normal;min-width:5.5em;max-width:13em;font-weight:600;border-bottom:1px solid var(--line);
vertical-align:bottom}
thead th .swatch{margin-right:.45em}
tbody th{font-weight:400;text-align:left;position:sticky;left:0;background:var(--card);max-width:22em;
overflow:hidden;text-overflow:ellipsis}
thead th:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
tbody tr+tr>*{border-top:1px solid var(--grid)}
tbody.entry th.entry{font-weight:600;padding-top:.8em}
tbody.entry tr+tr>*{border-top:0}
tbody.entry+tbody.entry tr:first-child>*{border-top:1px solid var(--line)}
tbody th .swatch{margin-right:.5em}
.settings td{max-width:24em;overflow:hidden;text-overflow:ellipsis;font-family:ui-monospace,SFMono-Regular,Menlo,
Consolas,"DejaVu Sans Mono",monospace;font-size:.88rem}
tr.differs>*{background:var(--mark)}
.unit{color:var(--soft);margin-left:.6em;font-size:.88em}
.total>*{font-weight:600}
details{margin:.6em 0}
summary{cursor:pointer;color:var(--soft);padding:.2em 0}
summary:hover{color:var(--ink)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,370px),1fr));gap:14px}
.pictures figure{color:var(--ink)}
.shown{padding:10px;background:#fff;color:#1b1d21}
.shown img{display:block;max-width:100%;height:auto;margin:0 auto}
.pictures figcaption{display:flex;align-items:center;gap:.5em;font-size:.88rem;margin:.4em .2em}
pre{white-space:pre-wrap;overflow-wrap:anywhere;padding:1em;border:1px solid var(--line);border-radius:10px;
background:var(--card);max-height:26em;overflow:auto}
footer{margin-top:4em;padding-top:1em;padding-bottom:2.5em;color:var(--soft);font-size:.85rem}
#smooth:checked~main .smooth{display:inline}
#smooth:checked~main .beside{opacity:.35;stroke-width:1;stroke-dasharray:none}
#log:checked~main .log{display:inline}
#log:checked~main .linear{display:none}
#log:checked~main .only-log{display:inline}
#log:checked~.bar label[for=log]::before,#smooth:checked~.bar label[for=smooth]::before{background:var(--focus);
border-color:var(--focus)}
#log:focus-visible~.bar label[for=log],#smooth:focus-visible~.bar label[for=smooth]{outline:2px solid var(--focus)}
@media(max-width:700px){.bar{position:static}html{scroll-padding-top:1rem}.bar nav{margin-left:0;width:100%}
th,td{padding:.36em .6em}tbody th{max-width:11em}h2{margin-top:1.8em}}
@media(prefers-color-scheme:dark){:root{--page:#15171a;--card:#1d2024;--ink:#e7e8ea;--soft:#9ba1aa;--line:#30343a;
--grid:#292d32;--mark:#22303f;--warn:#f0c27b;--warn-page:#33291a;--focus:#6db3ff}.shown{background:#f4f4f2}DARK}
@media print{.bar{display:none}body{background:#fff}.chart,.card,.pictures figure,tr{break-inside:avoid}}
"""


def style(num_runs: int) -> str:
    """The page's style sheet, with what shows and hides each run.

    Args:
      num_runs: how many runs there are.
    """
    dark = "".join(f".c{index}{{color:{colour}}}" for index, colour in enumerate(DARK_COLOURS))
    light = "".join(f".c{index}{{color:{colour}}}" for index, colour in enumerate(COLOURS))
    hidden = ",".join(f"#run{run}:not(:checked)~main .r{run}" for run in range(num_runs)) + "{display:none}"
    off = ",".join(f"#run{run}:not(:checked)~.bar label[for=run{run}]" for run in range(num_runs)) + "{opacity:.4}"
    focus = ",".join(f"#run{run}:focus-visible~.bar label[for=run{run}]" for run in range(num_runs))
    rules = [hidden, off, focus + "{outline:2px solid var(--focus)}"]
    return "\n".join([light, _STYLE.replace("DARK", dark).strip(), *rules])
