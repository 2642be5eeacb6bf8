"""Build a page as Markdown and as one self-contained HTML file, from text, tables, pictures and curves."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

Points = list[tuple[float, float]]


class PageBlock(NamedTuple):
    """A piece of the page, in both formats."""

    markdown: str
    html: str


def text_block(tag: str, content: str) -> PageBlock:
    escaped = html.escape(content, quote=False)
    return PageBlock({"h1": "# ", "h2": "## ", "p": ""}[tag] + escaped, f"<{tag}>{escaped}</{tag}>")


def picture_block(out: Path, path: Path, title: str) -> PageBlock:
    """A picture, embedded in the HTML and linked in the Markdown, which is a file in the folder `out`."""
    name, inside = path.relative_to(out).as_posix(), base64.b64encode(path.read_bytes()).decode()
    return PageBlock(f"![{title}]({name})", f'<img alt="{html.escape(title)}" src="data:image/png;base64,{inside}">')


def table_block(rows: Sequence[Sequence[str]]) -> PageBlock:
    """A table; the first row is its header."""
    escaped = [[html.escape(cell, quote=False) for cell in row] for row in rows]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in escaped]
    lines.insert(1, " | ".join(["---"] * len(rows[0])))
    cells = ["".join(f"<{tag}>{cell}</{tag}>" for cell in row)
             for tag, row in zip(["th"] + ["td"] * len(rows), escaped, strict=False)]  # fmt: skip
    return PageBlock(
        "\n".join(f"| {line} |" for line in lines), "<table><tr>" + "</tr>\n<tr>".join(cells) + "</tr></table>"
    )


def code_block(content: str) -> PageBlock:
    return PageBlock(f"```bash\n{content}\n```", f"<pre>{html.escape(content)}</pre>")


STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 64em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { border: 1px solid #ccc; padding: .3em .6em; text-align: left }
th, pre { background: #f3f3f3 }
img { max-width: 100% }
pre { padding: 1em; overflow-x: auto }"""


def write_files(title: str, blocks: Sequence[PageBlock], markdown: Path, page: Path) -> None:
    """Save the page in both formats."""
    markdown.write_text("\n\n".join(block.markdown for block in blocks) + "\n", encoding="utf-8")
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>\n{STYLE}\n</style>'
    body = "\n".join(block.html for block in blocks)
    whole = f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    page.write_text(whole, encoding="utf-8")


def draw(lines: Sequence[tuple[str, Points, int]], label: str, path: Path) -> None:
    """Save curves over images seen as a PNG; each curve is a name, points and the number of a colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points, colour in lines:
        if points:
            thin = "train/" in name
            axes.plot(
                *zip(*points, strict=True),
                "-" if thin else "o-",
                color=f"C{colour}",
                linewidth=0.8 if thin else 1.5,
                alpha=0.6 if thin else 1,
                markersize=3,
                label=name,
            )
    axes.set_xlabel("images seen")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
