"""The paper's numbers: the CSV that ships, its schema, and a recount in the paper's text.

DICLIP_PAPER_TEXT=/path/to/text.txt names a text of the paper whose tables stand in it as lines of `|` cells. The text is
not ours to ship; without it the file's SHA-256 must be the one of the last recount.
"""
import csv, hashlib, os, re
from collections import Counter
from pathlib import Path

import pytest

import diclip

FILE = Path(diclip.__file__).parent / "results/paper.csv"
SHA256 = "6bb61a51e946d9db4a7bb9bea5eef53f7b5ab769676f1f84c531f12aed3a2778"
ROWS = list(csv.DictReader(FILE.open(newline="", encoding="ascii")))
TEXT = os.environ.get("DICLIP_PAPER_TEXT", "")
UNITS = {"percent", "ratio", "minutes", "GB"}

# How each table's first line begins, in the order of the text; two of them begin alike.
HEADS = {
    "I": "| Method | Sup. | Backbone | VOC |", "II": "| Method | Sup. | Backbone | Val |", "III": "| Method | Type | Sup. | Backbone | Train |",
    "IV": "| Conditions | VCE |", "V": "| Conditions | Clustering |",
    "VIa": "| Attn. groups |", "VIb": "| Attn. layers |", "VIc": "| Attn Thre |", "VId": "| Attn weight |",
    "VIe": "| Class centroid |", "VIf": "| Prompt num. |", "VIg": "| Cache weight |", "VIh": "| Loss weight |",
    "VII": "| Number of Iter. |", "VIII": "| Single-class image set |", "IX": "| Methods | Decoder |", "X": "| Method | Type | Required Time |",
    "XIa": "| Conditions | Precision |", "XIb": "| Conditions | Precision |", "XII": "| Conditions | Single |",
    "XIII": "| Conditions | Cache_V |", "XIV": "| Nums |", "XV": "| Percentage |",
}
SIZES = {"I": 62, "II": 31, "III": 26, "IV": 15, "V": 12, **{f"VI{g}": 8 for g in "abcdefgh"}, "VII": 6, "VIII": 352, "IX": 31, "X": 47,
         "XIa": 6, "XIb": 6, "XII": 18, "XIII": 16, "XIV": 6, "XV": 12}


def of(table):
    return [r for r in ROWS if r["table"] == table]


def passages(text) -> dict:
    "The lines of every table: from its first line to the next table's, or to the first line that is no table."
    found, lines, at = {}, text.splitlines(), 0
    names = list(HEADS)
    for name, follower in zip(names, [*names[1:], None]):
        while not lines[at].startswith(HEADS[name]): at += 1
        end = at + 1
        while lines[end].startswith("|") and not (follower and lines[end].startswith(HEADS[follower])): end += 1
        found[name], at = lines[at:end], end
    return found


def cells(line) -> list:
    return [c.strip() for c in line.strip().strip("|").split("|") if c.strip()]


def printed(cell):
    "A cell's number without its unit; None for a dash; '' for anything else."
    number = re.fullmatch(r"(\d+(?:\.\d+)?)( mins| G|%)?", cell)
    return None if cell == "-" else number.group(1) if number else ""


def body(lines, width) -> list:
    "[(the label's cell or '', the last `width` cells as printed)] of the rows that hold nothing but numbers there."
    rows = []
    for line, below in zip(lines, [*lines[1:], ""]):
        given = cells(line)
        values = [printed(c) for c in given[-width:]]
        header = re.match(r"\|(-+\|)+$", below) or len(values) < width or "" in values
        if not header: rows.append((given[0] if len(given) > width else "", values))
    return rows


def name(cell) -> str:
    "A method's name without reference, venue and remark, in small letters."
    return re.split(r"[\[(,]| \S+’", cell)[0].replace("_", " ").strip(" .").lower()


def numbers(text) -> list:
    return re.findall(r"\d+(?:\.\d+|e-\d+)?", text)


@pytest.fixture(scope="module")
def text():
    if not TEXT: pytest.skip("DICLIP_PAPER_TEXT names no text of the paper")
    return passages(Path(TEXT).read_text(encoding="utf-8"))


@pytest.mark.parametrize("table", HEADS)
def test_every_number_stands_in_the_papers_table(text, table):
    mine = of(table)
    columns = list(dict.fromkeys(r["column"] for r in mine))
    rows = body(text[table], len(columns))
    everywhere = Counter(n for line in text[table] for n in numbers(line))
    assert not Counter(r["value"] for r in mine) - everywhere, "a number that the table does not hold"
    # cell by cell, in the order of the text: the same numbers, no more and no fewer, each in its column
    theirs = [(i, c, v) for i, (_, values) in enumerate(rows) for c, v in zip(columns, values) if v is not None]
    assert [(c, v) for _, c, v in theirs] == [(r["column"], r["value"]) for r in mine]
    # a row of ours is a row of theirs, with its name where the text kept it
    labels = {}
    for (i, _, _), r in zip(theirs, mine): labels.setdefault(i, set()).add(r["row"])
    assert all(len(l) == 1 for l in labels.values()) and len(set.union(*labels.values())) == len(labels)
    for i, (label,) in labels.items():
        cell = rows[i][0]
        if re.fullmatch("VI[a-h]", table): assert numbers(label) == numbers(cell)
        elif cell and table not in ("IV", "V"): assert name(label).startswith(name(cell))
    if table in ("VII", "XIV", "XV"): assert numbers(" ".join(columns)) == numbers(text[table][0])
    if table == "VIII":
        assert [c.strip(".") for c in cells(text[table][2])[1:]] == columns
        assert len(rows) == 16
        assert all("single" in r["row"] for r in mine[:176]) and all("co-occurrence" in r["row"] for r in mine[176:])


def test_the_file_is_the_one_that_was_recounted():
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == SHA256, "recount it with DICLIP_PAPER_TEXT, then write its new hash here"


def test_schema():
    assert list(ROWS[0]) == "table row column value unit source origin".split()
    assert all(v for r in ROWS for v in r.values()), "an empty field"
    keys = Counter((r["table"], r["row"], r["column"]) for r in ROWS)
    assert keys.most_common(1)[0][1] == 1, keys.most_common(1)
    assert {r["unit"] for r in ROWS} <= UNITS and {r["origin"] for r in ROWS} == {"paper", "other"}
    for r in ROWS:
        assert re.fullmatch(r"\d+(\.\d+)?", r["value"]), r
        assert float(r["value"]) <= 100 or r["unit"] == "minutes", r


def test_all_tables_are_there():
    assert {t: len(of(t)) for t in HEADS} == SIZES
    assert {re.sub("[a-h]$", "", t) for t in HEADS} == set("I II III IV V VI VII VIII IX X XI XII XIII XIV XV".split())
    assert {r["table"] for r in ROWS if r["origin"] == "other"} == {"rivals", "open vocabulary"}
    for r in ROWS:
        assert (r["origin"] == "paper") == (r["table"] in HEADS)
        letter = re.sub("([a-h])$", r"(\1)", r["table"])
        assert (r["source"] == f"DiCLIP, Table {letter}") == (r["origin"] == "paper"), r


@pytest.mark.parametrize("table, row, column, value", [
    ("I", "DiCLIP", "VOC val mIoU", 78.8), ("I", "DiCLIP", "VOC test mIoU", 78.9), ("I", "DiCLIP (no CRF)", "VOC val mIoU", 77.1),
    ("I", "WeCLIP", "VOC test mIoU", 77.2), ("II", "DiCLIP", "COCO val mIoU", 48.7), ("II", "POT", "COCO val mIoU", 47.9),
    ("III", "DiCLIP (static cache)", "VOC train CAM mIoU", 74.0), ("III", "DiCLIP (adapter)", "VOC train CAM mIoU", 78.2),
    ("IV", "baseline", "mIoU", 12.1), ("IV", "+ negative cache", "Precision", 84.8), ("V", "adapter from random weights", "Recall", 88.5),
    ("VIb", "1 layer", "CAM mIoU", 71.7), ("VIh", "loss weight 0.1", "Segmentation mIoU", 77.1), ("VII", "mIoU", "3 iterations", 77.1),
    ("VIII", "DiCLIP, single-class images", "avg", .18), ("VIII", "WeakCLIP, co-occurrence images", "plant", 2.14),
    ("IX", "DiCLIP (transformer head)", "Ratio to fully supervised", 96.6), ("X", "DiCLIP (online phase)", "Required time", 80),
    ("X", "DiCLIP (offline phase)", "GPU memory", 4.8), ("XIa", "On CLIP", "mIoU", 22.1), ("XIb", "Thresholding", "mIoU", 71.5),
    ("XII", "Normalization", "mIoU", 10.0), ("XIII", "SD v1.4", "Static CAM mIoU", 73.4), ("XIV", "mIoU", "10 images a class", 72.9),
    ("XV", "COCO", "0 % of classes", 42.1), ("rivals", "ExCEL", "VOC val mIoU", 78.4), ("rivals", "ExCEL", "COCO val mIoU", 50.3),
])
def test_values_read_by_hand(table, row, column, value):
    from diclip.app.paper import paper_value
    assert paper_value(table, row, column) == value


def test_the_tables_agree_with_each_other():
    "What the paper prints in several places is one number, and its averages and ratios are those of the numbers beside them."
    from diclip.app.paper import paper_numbers, paper_table, paper_value as v
    ours = v("IV", "+ adapter", "mIoU")
    best = paper_numbers("VI").groupby(["table", "column"])["value"].max().unstack()
    assert (best["Segmentation mIoU"] == ours).all() and (best["CAM mIoU"] == v("III", "DiCLIP (adapter)", "VOC train CAM mIoU")).all()
    assert ours == v("I", "DiCLIP (no CRF)", "VOC val mIoU") == v("VII", "mIoU", "3 iterations") == v("XV", "VOC", "100 % of classes") == v("XIII", "SD v2.1", "Segmentation mIoU")
    assert v("IV", "+ VCE", "mIoU") == v("XV", "VOC", "VCE")
    assert v("III", "DiCLIP (VCE)", "VOC train CAM mIoU") == v("XIa", "On SD", "mIoU") == v("XII", "Ours (additive)", "mIoU") == v("XIV", "mIoU", "VCE without a cache")
    confusion = paper_table("VIII")
    assert (confusion.drop(columns="avg").mean(axis=1) - confusion["avg"]).abs().max() < .011


def test_a_table_with_grids_is_found_as_a_whole():
    from diclip.app.paper import paper_numbers, paper_table
    assert set(paper_numbers("VI")["table"]) == {f"VI{g}" for g in "abcdefgh"} and set(paper_numbers("XI")["table"]) == {"XIa", "XIb"}
    assert paper_table("IV").index.tolist() == ["baseline", "+ VCE", "+ positive cache", "+ negative cache", "+ adapter"]
    assert len(paper_numbers()) == len(ROWS) and paper_numbers()["value"].dtype == float
    mine = paper_numbers()
    mine["value"] = 0      # a copy: the next reader is not concerned
    assert paper_numbers()["value"].max() == 1496


@pytest.mark.parametrize("asked, words", [
    (("VIx", "a", "b"), "VIa"), (("I", "DiCLIP (with CRF)", "VOC val mIoU"), "DiCLIP (no CRF)"), (("I", "DiCLIP", "VOC mIoU"), "VOC val mIoU"),
    (("IX", "SegFormer", "Ratio to fully supervised"), "prints no number"),
])
def test_a_number_that_is_not_there_names_its_neighbors(asked, words):
    from diclip.app.paper import paper_value
    with pytest.raises(ValueError, match=re.escape(words)): paper_value(*asked)
