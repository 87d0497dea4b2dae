"""Writing a report: Markdown, CSV and one HTML file that opens without a network."""

import base64
import csv
import html
import io
from pathlib import Path

from slimming.report.collect import Collection
from slimming.report.sections import Section, Table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin: 0.8rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: 3px 9px; text-align: right; }
th { border-bottom: 2px solid #888; } th:first-child, td:first-child { text-align: left; }
tr:nth-child(even) td { background: #f6f6f6; } img { max-width: 100%; } nav a { margin-right: 1.2em; }
"""
COLUMNS = ("run", "role", "model", "data", "seed", "parent", "sparsity", "ratio_asked", "ratio_got", "test_acc_before")
COLUMNS += ("test_acc_pruned", "test_acc", "val_acc", "n_test", "num_params", "macs", "activation_bytes", "size_bytes")
COLUMNS += ("latency_before_ms", "latency_after_ms", "latency_device", "epochs", "wall_time_s")


def markdown(title: str, sections: list[Section], folder: Path) -> str:
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            if isinstance(part, Table):
                lines += ["| " + " | ".join(part.head) + " |", "|" + "---|" * len(part.head)]
                lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in part.rows]
            elif isinstance(part, Path):
                lines.append(f"![{section.title}]({part.relative_to(folder)})")
            else:
                lines.append(part)
            lines.append("")
    return "\n".join(lines)


def terminal(table: Table, columns: list[str]) -> str:
    """Return some columns of a table as aligned text."""
    places = [table.head.index(c) for c in columns]
    rows = [[row[i] for i in places] for row in [table.head, *table.rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(places))]
    first, *rest = widths
    return "\n".join(
        f"{row[0]:{first}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], rest, strict=True)) for row in rows
    )


def page(title: str, sections: list[Section]) -> str:
    """Return one HTML page; pictures are inside it."""
    body = [f"<h1>{html.escape(title)}</h1>", "<nav>"]
    body += [f'<a href="#s{i}">{html.escape(s.title)}</a>' for i, s in enumerate(sections)]
    body.append("</nav>")
    for i, section in enumerate(sections):
        body.append(f'<h2 id="s{i}">{html.escape(section.title)}</h2>')
        for part in section.parts:
            if isinstance(part, Table):
                body.append(_table(part))
            elif isinstance(part, Path):
                data = base64.b64encode(part.read_bytes()).decode()
                body.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
            else:
                body.append(f"<p>{html.escape(part)}</p>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def spreadsheet(found: Collection, folder: Path) -> str:
    """Return one CSV line per finished run; accuracies in [0, 1]."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    for run in found.runs:
        r, m, latency = run.result, run.result["metrics"], run.result.get("latency_ms") or {}
        ratio = r.get("ratio") or {}
        row = {
            "run": run.folder.relative_to(folder),
            "sparsity": r["config"].get("sparsity"),
            "val_acc": m.get("val/acc"),
        }
        row |= {k: r.get(k) for k in ("role", "model", "data", "seed", "parent", "n_test", "wall_time_s")}
        row |= {"ratio_asked": ratio.get("asked"), "ratio_got": ratio.get("got")}
        row |= {f"test_acc{x}": m.get(f"test/acc{x}") for x in ("_before", "_pruned", "")}
        row |= r["cost"] | {k: r.get(k) for k in ("activation_bytes", "size_bytes")}
        row |= {f"latency_{k}_ms": latency.get(k) for k in ("before", "after")} | {
            "latency_device": latency.get("device")
        }
        row["epochs"] = len(r.get("history") or []) or None
        writer.writerow({k: row.get(k) for k in COLUMNS})
    return text.getvalue()
