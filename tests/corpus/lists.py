"""What people's lists are like, and what has to come of their rows: one list a case."""

import gzip
import json
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One list, and what has to come of its rows."""

    what: str
    file: str | bytes | pa.Table
    name: str = "list.csv"
    rows: tuple[tuple[str, str], ...] = ()
    """URL and caption of the good rows."""
    invalid: tuple[str, ...] = ()
    """What is said of each bad row."""
    num_duplicates: int = 0
    error: str = ""
    """What is said if the list itself is refused."""


A, B, C = (f"http://{host}.example/x.jpg" for host in "abc")
AB = ((A, "an apple"), (B, "a pear"))
LINES = f"{A},an apple\n{B},a pear\n"
_FILLER = tuple((f"http://f.example/{number}", "f") for number in range(8))
_FILLER_LINES = "".join(f"{url},{caption}\n" for url, caption in _FILLER)


def _row(what: str, url: str, caption: str, becomes: tuple[str, str] | str) -> Listed:
    """A row among good ones, as JSON: what it becomes, or what is said of it."""
    rows = [*({"url": url, "caption": caption} for url, caption in _FILLER), {"url": url, "caption": caption}]
    return Listed(
        what=what,
        name="list.jsonl",
        file="\n".join(map(json.dumps, rows)),
        rows=(*_FILLER, becomes) if isinstance(becomes, tuple) else _FILLER,
        invalid=(f"row 9 {becomes}",) if isinstance(becomes, str) else (),
    )


def _table(**columns: object) -> pa.Table:
    return pa.table({"url": [A, B], "caption": ["an apple", "a pear"], **columns})


def _schema(text: pa.DataType) -> pa.Schema:
    return pa.schema([("url", text), ("caption", text)])


def _packed(lines: str) -> bytes:
    return bytes(pa.compress(lines.encode(), "zstd", asbytes=True))


def _rows() -> list[Listed]:
    long = "http://a.example/" + 8_176 * "x"
    good = {
        "a space around a URL": (f" {A} ", "c", (A, "c")),
        "a no-break space around a URL": (f"\xa0{A}\xa0", "c", (A, "c")),
        "a line feed behind a URL": (f"{A}\r\n", "c", (A, "c")),
        "a zero-width space and a byte order mark around a URL": (f"\ufeff{A}\u200b", "c", (A, "c")),
        "an ampersand as HTML writes it": (f"{A}?a=1&amp;b=2", "c", (f"{A}?a=1&b=2", "c")),
        "an ampersand as it is": (f"{A}?a=1&b=2", "c", (f"{A}?a=1&b=2", "c")),
        "a space in a path": ("http://a.example/my photo.jpg", "c", ("http://a.example/my photo.jpg", "c")),
        "a path in another script": ("http://a.example/龙.jpg", "c", ("http://a.example/龙.jpg", "c")),
        "a host in another script": ("http://例え.example/", "c", ("http://例え.example/", "c")),
        "space around a caption": (A, "\t a cup \n", (A, "a cup")),
        "several lines in a caption": (A, "a\nb", (A, "a\nb")),
        "an emoji in a caption": (A, "\N{DRAGON}", (A, "\N{DRAGON}")),
        "markup in a caption": (A, "[/b]<b>&amp;", (A, "[/b]<b>&amp;")),
        "a caption that looks like a number": (A, "2024", (A, "2024")),
        "a caption that says null": (A, "null", (A, "null")),
        "the longest URL": (long[:8_192], "c", (long[:8_192], "c")),
    }
    bad = {
        "an empty URL": ("", "c", "has a url that is empty"),
        "a blank URL": ("\xa0 \u3000", "c", "has a url that is empty"),
        "no URL": (None, "c", "has a url that is missing"),
        "an empty caption": (A, "", "has a caption that is empty"),
        "a blank caption": (A, " \t\u2003", "has a caption that is empty"),
        "no caption": (A, None, "has a caption that is missing"),
        "a number as caption": (A, 7, "has 'caption' that is no text: 7"),
        "an object as URL": ({"src": A}, "c", "has 'url' that is no text: {'src'"),
        "a data URL": ("data:image/png;base64,iVBORw0KGgo=", "c", "has a url that begins with no scheme://: 'data:"),
        "a URL of 30 kB": ("http://a.example/" + 30_000 * "x", "c", "has a url that has over 8192 bytes"),
        "a control character in a URL": ("http://a.example/\x07x", "c", "has a url that has a control character"),
        "an escape in a URL": ("http://a.example/\x1b[2J", "c", "has a url that has a control character"),
        "a line feed in a URL": ("http://a.example/\nx", "c", "has a url that has a control character"),
        "a lone surrogate in a caption": (A, "\ud800", "has 'caption' that is not UTF-8: '\\ud800'"),
        "a lone surrogate in a URL": (f"{A}\udfff", "c", "has 'url' that is not UTF-8"),
        "a word as URL": ("apple", "c", "has a url that begins with no scheme://: 'apple'"),
        "a host without a scheme": ("a.example/x.jpg", "c", "has a url that begins with no scheme://"),
        "a caption of 100 kB": (A, "x" * 100_000, "has a caption that has over 65536 bytes"),
    }
    return [_row(what, *parts) for what, parts in (good | bad).items()]  # type: ignore[arg-type]


def _captions_of_one_picture() -> list[Listed]:
    five = [f"caption {number}" for number in range(5)]
    pairs = tuple((A, caption) for caption in five)
    return [
        Listed(
            what="five captions of a picture, JSON",
            name="l.jsonl",
            file=json.dumps({"url": A, "caption": five}),
            rows=pairs,
        ),
        Listed(
            what="five captions of a picture, parquet",
            name="l.parquet",
            file=pa.table({"url": [A], "caption": [five]}),
            rows=pairs,
        ),
        Listed(
            what="a list of captions with an empty one",
            name="l.jsonl",
            file=json.dumps({"url": A, "caption": ["x", "", "y"]}),
            rows=((A, "x"), (A, "y")),
            invalid=("row 1 has a caption that is empty",),
        ),
        Listed(
            what="an empty list of captions",
            name="l.jsonl",
            file="\n".join(json.dumps({"url": A, "caption": it}) for it in ([], ["x"])),
            rows=((A, "x"),),
            invalid=("row 1 has a caption that is missing",),
        ),
        Listed(
            what="captions one by one and as lists",
            name="l.jsonl",
            file="\n".join(json.dumps({"url": A, "caption": it}) for it in ("x", ["y", "x"])),
            rows=((A, "x"), (A, "y")),
            num_duplicates=1,
        ),
    ]


def _csv() -> list[Listed]:
    head, quote = "url,caption\n", "has a quote that is not closed"
    return [
        Listed(what="CSV", file=head + LINES, rows=AB),
        Listed(what="CSV with a byte order mark", file="\ufeff" + head + LINES, rows=AB),
        Listed(what="CSV with CR and LF", file=(head + LINES).replace("\n", "\r\n"), rows=AB),
        Listed(what="CSV with CR only", file=(head + LINES).replace("\n", "\r"), rows=AB),
        Listed(what="CSV without a line end at its end", file=(head + LINES).rstrip(), rows=AB),
        Listed(what="CSV with blank lines", file=f"\n{head}\n{LINES}\n\n", rows=AB),
        Listed(what="CSV with semicolons", file=(head + LINES).replace(",", ";"), rows=AB),
        Listed(what="CSV without a header", file=LINES, rows=AB),
        Listed(what="CSV without a header, the caption first", file=f"an apple,{A}\n", rows=((A, "an apple"),)),
        Listed(what="quoted cells", file=f'{head}{A},"an ""apple"", green"\n', rows=((A, 'an "apple", green'),)),
        Listed(
            what="a quoted cell of three lines",
            file=f'{head}{A},"a\nb\n\nc"\n{B},d\n',
            rows=((A, "a\nb\n\nc"), (B, "d")),
        ),
        Listed(what="a quote within a cell", file=f'{head}{A},a 6" pipe\n', rows=((A, 'a 6" pipe'),)),
        Listed(
            what="a lone quote at the end",
            file=f'{head}{A},x\n{B},y\n{C},"z\n',
            rows=((A, "x"), (B, "y")),
            invalid=(f"row 3 {quote}",),
        ),
        Listed(
            what="a lone quote that would swallow the next rows",
            file=f'{head}{A},"x\n{B},y\n{C},z"\n',
            rows=((B, "y"), (C, 'z"')),
            invalid=(f"row 1 {quote}",),
        ),
        Listed(
            what="a lone quote before a quoted cell",
            file=f'{head}{A},"x\n{B},"y, or z"\n{C},z\n',
            rows=((B, "y, or z"), (C, "z")),
            invalid=(f"row 1 {quote}",),
        ),
        Listed(
            what="letters behind a closing quote",
            file=f'{head}{A},"x" y\n{B},y\n{C},z\n',
            rows=((B, "y"), (C, "z")),
            invalid=("row 1 is no CSV",),
        ),
        Listed(
            what="a cell too few and a cell too many",
            file=f"{head}{A}\n{B},y, or z\n{C},z\n{_FILLER_LINES}",
            rows=((C, "z"), *_FILLER),
            invalid=("row 1 has 1 cells instead of 2", "row 2 has 3 cells instead of 2"),
        ),
        Listed(
            what="a row that is not UTF-8",
            file=f"{head}{LINES}".encode() + f"{C},caf".encode() + b"\xe9\n",
            rows=AB,
            invalid=("row 3 has 'caption' that is not UTF-8",),
        ),
        Listed(what="a zero byte", file=f"{head}{LINES}{C}\0,z\n", rows=(*AB, (C, "z"))),
        Listed(what="the same row twice", file=head + LINES + LINES, rows=AB, num_duplicates=2),
        Listed(what="TSV", name="l.tsv", file=(head + LINES).replace(",", "\t"), rows=AB),
        Listed(
            what="TSV without a header, the caption first", name="l.tsv", file=f"an apple\t{A}\na pear\t{B}\n", rows=AB
        ),
        Listed(what="TSV with a lone quote", name="l.tsv", file=f'"x\t{A}\ny\t{B}\n', rows=((A, '"x'), (B, "y"))),
        Listed(
            what="TSV with a row of empty cells",
            name="l.tsv",
            file="url\tcaption\n" + LINES.replace(",", "\t") + "\t\n",
            rows=AB,
            invalid=("row 3 has a url that is empty",),
        ),
        Listed(what="TSV with quoted cells", name="l.tsv", file=f'"x\ty"\t{A}\n', rows=((A, "x\ty"),)),
        Listed(
            what="URLs alone",
            name="l.txt",
            file="http://a.example/red_cup.jpg\n\n",
            rows=(("http://a.example/red_cup.jpg", "red cup"),),
        ),
        Listed(
            what="URLs alone, quoted",
            name="l.txt",
            file="http://a.example/a%20cup.jpg?x=1\n",
            rows=(("http://a.example/a%20cup.jpg?x=1", "a cup"),),
        ),
        Listed(
            what="a host alone",
            name="l.txt",
            file="http://a.example/\n",
            rows=(("http://a.example/", "http://a.example/"),),
        ),
    ]


def _json_and_parquet() -> list[Listed]:
    objects = [{"url": url, "caption": caption} for url, caption in AB]
    lines = "\n".join(map(json.dumps, objects))
    dictionary = pa.array(["an apple", "a pear"]).dictionary_encode()
    return [
        Listed(what="JSON lines", name="l.jsonl", file=lines, rows=AB),
        Listed(what="JSON lines with blank ones", name="l.jsonl", file=f"\n\n{lines}\n\n \n", rows=AB),
        Listed(what="JSON lines, named json", name="l.json", file=lines, rows=AB),
        Listed(what="a JSON array", name="l.json", file=json.dumps(objects, indent=1), rows=AB),
        Listed(what="a JSON array, named jsonl", name="l.jsonl", file=json.dumps(objects), rows=AB),
        Listed(
            what="a JSON array, packed", name="l.json.gz", file=gzip.compress(json.dumps(objects).encode()), rows=AB
        ),
        Listed(what="JSON lines, zstd", name="l.jsonl.zst", file=_packed(lines), rows=AB),
        Listed(what="CSV, zstd", name="l.csv.zst", file=_packed(f"url,caption\n{LINES}"), rows=AB),
        Listed(what="TSV, packed", name="l.tsv.gz", file=gzip.compress(LINES.replace(",", "\t").encode()), rows=AB),
        Listed(
            what="a line that is no JSON and one that is no object",
            name="l.jsonl",
            file=f'{lines}\n{{"url":\n["u", "c"]\n',
            rows=AB,
            invalid=("row 3 is no JSON", "row 4 is no JSON object"),
        ),
        Listed(
            what="a line that is too deep",
            name="l.jsonl",
            file=f"{lines}\n{100_000 * '['}",
            rows=AB,
            invalid=("row 3 is no JSON (maximum recursion depth",),
        ),
        Listed(what="parquet", name="l.parquet", file=_table(), rows=AB),
        Listed(
            what="parquet, large strings", name="l.parquet", file=_table().cast(_schema(pa.large_string())), rows=AB
        ),
        Listed(what="parquet, string views", name="l.parquet", file=_table().cast(_schema(pa.string_view())), rows=AB),
        Listed(what="parquet, dictionary", name="l.parquet", file=_table(caption=dictionary), rows=AB),
        Listed(what="parquet, other columns", name="l.parquet", file=_table(size=[{"w": 1}, None]), rows=AB),
        Listed(
            what="parquet, nulls",
            name="l.parquet",
            file=_table(caption=["an apple", None]),
            rows=AB[:1],
            invalid=("row 2 has a caption that is missing",),
        ),
    ]


def _refused() -> list[Listed]:
    seems = "is not readable as the list that its name says: it seems to be"
    return [
        Listed(what="parquet, named csv", file=b"PAR1" + bytes(20), error=f"{seems} parquet"),
        Listed(what="a page, named csv", file="<!doctype html><p>", error=f"{seems} HTML"),
        Listed(what="a spreadsheet, named csv", file=b"PK\x03\x04" + bytes(20), error=f"{seems} ZIP"),
        Listed(what="gzip, named csv", file=gzip.compress(b"x"), error=f"{seems} gzip"),
        Listed(what="text, named gz", name="l.csv.gz", file="url,caption\n", error=f"{seems} text"),
        Listed(what="text in UTF-16", file=LINES.encode("utf-16"), error=f"{seems} text in UTF-16"),
        Listed(what="CSV, named parquet", name="l.parquet", file=LINES, error=f"{seems} text"),
        Listed(what="a pointer of Git LFS", name="l.parquet", file="version https://git-lfs", error=f"{seems} Git LFS"),
        Listed(
            what="half a gzip file",
            name="l.csv.gz",
            file=gzip.compress(LINES.encode() * 99)[:-30],
            error="is not readable",
        ),
        Listed(
            what="half a JSON array",
            name="l.json",
            file='[{"url": "http://a", "capt',
            error="row 1 of the JSON array can't be read",
        ),
        Listed(
            what="a JSON array that is too deep",
            name="l.json",
            file=f'[{{"url": "{A}", "caption": "x"}}, {100_000 * "["}',
            error="row 2 of the JSON array can't be read: maximum recursion depth",
        ),
        Listed(what="an empty file", file="", error="has no column that looks like 'url'"),
        Listed(what="a header alone", file="url,caption\n", error="has no rows"),
        Listed(
            what="no column of captions",
            file="url,words\nhttp://a,x\n",
            error="has no column that looks like 'caption'",
        ),
        Listed(
            what="a column of numbers",
            name="l.parquet",
            file=_table(caption=[1, 2]),
            error="text is needed, the column is of type int64",
        ),
        Listed(
            what="the columns exchanged", file="caption,url\n" + LINES, error="2 of 2 rows are bad, more than the 50%"
        ),
    ]


LISTED = [*_rows(), *_captions_of_one_picture(), *_csv(), *_json_and_parquet(), *_refused()]
