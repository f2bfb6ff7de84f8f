"""The results of an evaluation as tables: on the console, and with the pictures as one HTML page that works offline."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from sslcells.evaluation import hover_map, neighbour_rows
from sslcells.evaluation.against import against_tables
from sslcells.evaluation.baselines import baseline_table
from sslcells.evaluation.gallery import Picture
from sslcells.evaluation.in_short import NONE_SEEN, YES, basis
from sslcells.evaluation.in_short_picture import TITLE as IN_SHORT
from sslcells.evaluation.lab_tables import lab_tables
from sslcells.evaluation.tables import Table as Table
from sslcells.evaluation.tables import of_images
from sslcells.evaluation.tables import shown as shown
from sslcells.evaluation.ways import VOTE

CLASSIFIERS = ("the run's classifier", "kNN", "linear probe", "fine-tuning", "few-shot")


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The tables of an evaluation's results; empty ones are left out."""
    query_split, rows = result["asked"], result["figures"]
    interval = f"%, with 95 % intervals from {result['resamples']:,} resamples of sources, or of images"
    apart = "neighbours of the image's own source are left out"
    order = {task: place for place, task in enumerate(CLASSIFIERS)}
    classifiers = sorted((r for r in rows if r["task"] in order), key=lambda r: order[r["task"]])
    found = [
        _of_rows(
            f"Classes of the {query_split} split",
            classifiers,
            f"{interval}. Trained or searched in train, measured on {query_split}; {apart}. "
            f"Per source: each source counts once. {a_vote(rows)}",
        ),
        baseline_table(result),
        _of_rows(
            f"Retrieval inside the {query_split} split",
            [r for r in rows if r["task"] == "retrieval"],
            f"{interval}; {apart}.",
        ),
        _of_rows(
            f"Clustering of the {query_split} split",
            [r for r in rows if r["task"] == "clustering"],
            "0: no better than chance, 1: equal to the classes; resamples keep the clusters",
            percent=False,
        ),
        _by_class(result),
        _health(result["health"]),
    ]
    return [table for table in found if table.rows]


def a_vote(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a vote is, where rows of figures are of votes."""
    return f"Per {VOTE}: a source is of one class by the mean of its images' scores." * any(
        row["unit"] == VOTE for row in rows
    )


def _of_rows(title: str, rows: Sequence[Mapping[str, Any]], caption: str, percent: bool = True) -> Table:
    metrics = list(dict.fromkeys(m for row in rows for m in row["scores"]))
    lines = []
    for row in rows:
        scores = [shown(row["scores"].get(m), percent) for m in metrics]
        name = row["name"]
        for what in ("draws", "seeds"):
            if (spread := row.get(f"spread over {what}")) is not None:
                name += f" (± {100 * spread:.1f} between {what})"
        lines.append([row["task"], name, row["unit"], of_images(row), *scores])
    return Table(title, ["method", "", "per", "images", *metrics], lines, caption)


def _by_class(result: Mapping[str, Any]) -> Table:
    rows = result["by class"]
    metrics = list(dict.fromkeys(m for row in rows for m in row["scores"]))
    lines = [
        [r["method"], r["class"], r["unit"], f"{r['images']:,}", "" if r["sources"] is None else f"{r['sources']:,}"]
        + [shown(r["scores"].get(m)) for m in metrics]
        for r in rows
    ]
    columns = ["method", "class", "per", "images", "sources", *metrics]
    return Table(f"Each class of the {result['asked']} split", columns, lines, "%, with 95 % intervals")


def _health(health: Mapping[str, Mapping[str, float | None]]) -> Table:
    keys = list(dict.fromkeys(k for figures in health.values() for k in figures))
    lines = [[split, *(_number(figures.get(k)) for k in keys)] for split, figures in health.items()]
    caption = (
        "effective rank: dimensions in use; row std: 1 spread, 0 collapsed; uniformity: lower is more even; "
        "alignment: mean squared distance of two augmented views, 0 to 4"
    )
    return Table("Without labels", ["split", *keys], lines, caption)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def say_leaks(console: Console, found: Mapping[str, Any]) -> None:
    """Print the leaks, before any figure."""
    say_findings(console, "Leaks", found["findings"])


def say_findings(console: Console, title: str, findings: Sequence[Mapping[str, Any]]) -> None:
    """Print sentences below a title, with a mark before those that warn."""
    console.print(title, style="bold")
    for finding in findings:
        mark = "!" if finding["warning"] else "·"
        console.print(f"  {mark} {finding['text']}", markup=False, soft_wrap=True)


def say_table(console: Console, table: Table) -> None:
    """Print a table, after an empty line."""
    drawn = RichTable(title=table.title, caption=table.caption, title_justify="left", caption_justify="left")
    for column in table.columns:
        drawn.add_column(column)
    for row in table.rows:
        drawn.add_row(*row)
    console.print()
    console.print(drawn, markup=False)


def say_figures(console: Console, result: Mapping[str, Any]) -> None:
    """Print the tables and notes."""
    for table in tables(result):
        say_table(console, table)
    if result.get("labs"):
        for table in lab_tables(result["labs"]):
            say_table(console, table)
        say_findings(console, "Across laboratories", result["labs"]["findings"])
    if result.get("against"):
        for table in against_tables(result):
            say_table(console, table)
        say_findings(console, "Against frozen encoders", [one["finding"] for one in result["against"]])
    say_answers(console, result.get("answers") or ())
    for note in result["notes"]:
        console.print(f"  · {note}", markup=False, soft_wrap=True)


def say_answers(console: Console, answers: Sequence[Mapping[str, Any]]) -> None:
    """Print questions with their verdicts and sentences; nothing where there are none."""
    said = [{**one, "text": f"{one['question']} {one['verdict'].capitalize()}. {one['text']}"} for one in answers]
    if said:
        say_findings(console, IN_SHORT, said)


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 75rem;
  padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #bbb; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
figure { margin: 1rem 0; break-inside: avoid; }
figure img { max-width: 100%; height: auto; }
figcaption, .caption, .made { color: #555; font-size: .85rem; margin: .3rem 0; }
.warning { border-left: .3rem solid #D55E00; padding-left: .5rem; font-weight: 600; list-style: "! "; }
dl { margin: .5rem 0; max-width: 50rem; } dt { font-weight: 600; margin-top: .7rem; break-after: avoid; }
dd { margin: .1rem 0 0; break-inside: avoid; }
.verdict { display: inline-block; border: 1px solid #777; border-radius: .3rem; padding: 0 .4rem; margin-left: .2rem;
  font-size: .9em; }
.verdict.good { border-color: #006b4f; color: #006b4f; } .verdict.bad { border-color: #a33a00; color: #a33a00; }
.first img { width: 30rem; }
@media screen { .shown > img { display: none; } }
@media print { body { font-size: 9pt; max-width: none; padding: 0; } .caption, figcaption, .made { font-size: 8pt; }
  table { font-size: 7pt; }
  h2, h3, thead { break-after: avoid; } .caption { break-before: avoid; } figure img { max-height: 20cm; }
  .first img { width: 8.5cm; } .scroll { overflow: visible; break-inside: avoid; } tr { break-inside: avoid; }
  th, td { white-space: normal; padding: .1rem .3rem; } }
"""


def page(result: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """One HTML page with leaks, figures and pictures, which needs no other file or network."""
    encoder = result["encoder"]
    about = f"sslcells {result['sslcells']}, {encoder['model']}, weights sha256 {encoder['sha256'][:16]}…"
    body = _first(result, [picture for picture in pictures if picture.title == IN_SHORT])
    body += ["<h2>Leaks</h2>", *_list(result["leaks"]["findings"]), *section_of("Figures", tables(result), ())]
    if result.get("labs"):
        body += section_of("Across laboratories", lab_tables(result["labs"]), (), result["labs"]["findings"])
    if result.get("against"):
        findings = [one["finding"] for one in result["against"]]
        body += section_of("Against frozen encoders", against_tables(result), (), findings)
    if result["notes"]:
        body += ["<h3>Notes</h3>", "<ul>", *(f"<li>{escape(note)}</li>" for note in result["notes"]), "</ul>"]
    body += section_of("Pictures", (), [picture for picture in pictures if picture.title != IN_SHORT])
    return document(f"{result['run']}: what was learned", about, body)


def _first(result: Mapping[str, Any], pictures: Sequence[Picture]) -> list[str]:
    """The answers, and the picture beside them; empty where nothing was answered."""
    answers = result.get("answers")
    return answer_section(answers, basis(result), pictures) if answers else []


def answer_section(answers: Sequence[Mapping[str, Any]], caption: str, pictures: Sequence[Picture] = ()) -> list[str]:
    """A heading, questions with their verdicts and sentences, and pictures as lines of HTML."""
    body = [f"<h2>{IN_SHORT}</h2>", "<dl>"]
    for one in answers:
        kind = "bad" if one["warning"] else "good" if one["verdict"] in (YES, NONE_SEEN) else ""
        verdict = f'<span class="{f"verdict {kind}".strip()}">{escape(one["verdict"])}</span>'
        text = escape(one["text"]).replace(" %", "&nbsp;%")
        body += [f"<dt>{escape(one['question'])} {verdict}</dt>", f"<dd>{text}</dd>"]
    return [*body, "</dl>", f'<p class="caption">{escape(caption)}</p>', *_figures(pictures, "first")]


def _list(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    kinds = [' class="warning"' if finding["warning"] else "" for finding in findings]
    lines = [f"<li{kind}>{escape(of['text'])}</li>" for kind, of in zip(kinds, findings, strict=True)]
    return ["<ul>", *lines, "</ul>"]


def section_of(
    title: str, found: Sequence[Table], pictures: Sequence[Picture], findings: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """A heading, tables, findings and pictures as lines of HTML."""
    body = [f"<h2>{escape(title)}</h2>"]
    for table in found:
        body += [f"<h3>{escape(table.title)}</h3>", f'<div class="scroll" tabindex="0">{_html(table)}</div>']
        body.append(f'<p class="caption">{escape(table.caption)}</p>')
    body += _list(findings) if findings else []
    for picture in pictures:
        body += [f"<h3>{escape(picture.title)}</h3>", *_figures([picture])]
    return body


def _figures(pictures: Sequence[Picture], kind: str = "") -> list[str]:
    body, named = [], f' class="{kind}"' if kind else ""
    for picture in pictures:
        data = base64.b64encode(picture.path.read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{escape(picture.title)}">'
        body.append(f"<figure{named}>{image}{picture.live}<figcaption>{escape(picture.caption)}</figcaption></figure>")
    return body


def document(title: str, about: str, body: Sequence[str], style: str = "") -> str:
    """An HTML page that needs no other file or network; `style` is added to that of all pages."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{hover_map.STYLE}{neighbour_rows.STYLE}{style}</style>"
    )
    lines = "\n".join([f"<h1>{escape(title)}</h1>", f'<p class="made">{escape(about)}</p>', *body])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{lines}\n</body></html>\n'


def _html(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
