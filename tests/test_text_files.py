"""Files of texts and of pairs that differ from what one expects, and what each gets."""

import codecs
import csv
import io
import json
import logging
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bdia_jax import data

TOKENIZER = data.byte_tokenizer()
TWO = [("a?", "b"), ("c?", "d e")]
"""What is in the files below, if nothing else is said."""
ODD = "x\u2028y\u2029z\u0085w\x0bv\x0cu\x1ct"
"""Characters at which str.splitlines() splits."""


def lines(*pairs, end="\n", **options):
    """JSON lines of prompts and completions."""
    records = [{"prompt": prompt, "completion": text} for prompt, text in pairs or TWO]
    return "".join(json.dumps(record, **options) + end for record in records).encode()


def table(separator=",", end="\r\n", pairs=TWO, columns=("prompt", "completion")):
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=separator, lineterminator=end).writerows([columns, *pairs])
    return file.getvalue().encode()


def listed(pairs=TWO, **options):
    records = [{"prompt": prompt, "completion": text} for prompt, text in pairs]
    return json.dumps(records, **options).encode()


def parquet(*rows, **row):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows] or [row]), file)
    return file.getvalue()


def texts(examples):
    """The prompts and the completions of examples."""
    for example in examples:
        parts = [[t for t, yes in zip(*example) if yes is learned] for learned in (False, True)]
        assert parts[1].pop() == TOKENIZER.end
        yield tuple(map(TOKENIZER.decode, parts))


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------

RIGHT = {
    # What it is, its name, its contents, and the pairs that come out.
    "as documented": ("a.jsonl", lines(), TWO),
    "no line end at the end": ("a.jsonl", lines().rstrip(b"\n"), TWO),
    "line ends of Windows": ("a.jsonl", lines(end="\r\n"), TWO),
    "blank lines": ("a.jsonl", b"\n \r\n" + lines(end="\n\n\t\n") + b"\n", TWO),
    "a byte-order mark": ("a.jsonl", codecs.BOM_UTF8 + lines(), TWO),
    "two files with such marks in one": ("a.jsonl", 2 * (codecs.BOM_UTF8 + lines()), 2 * TWO),
    "U+2028, U+2029 and U+0085 in texts": (
        "a.jsonl",
        lines(("p" + ODD, "c" + ODD), ensure_ascii=False),
        [("p" + ODD, "c" + ODD)],
    ),
    "the same, escaped": ("a.jsonl", lines(("p" + ODD, "c" + ODD)), [("p" + ODD, "c" + ODD)]),
    "characters in two halves that belong together": (
        "a.jsonl",
        b'{"prompt": "\\ud83d\\ude00", "completion": "b"}',
        [("😀", "b")],
    ),
    "other keys, in another order": (
        "a.jsonl",
        b'{"id": [1, {"a": null}], "completion": "b", "prompt": "a?"}',
        TWO[:1],
    ),
    "an empty completion": ("a.jsonl", lines(("a?", "")), [("a?", "")]),
    "a suffix in capitals": ("a.JSONL", lines(), TWO),
    "a suffix of others": ("a.ndjson", lines(), TWO),
    "a list": ("a.json", listed(), TWO),
    "a list over many lines": ("a.Json", codecs.BOM_UTF8 + listed(indent=2), TWO),
    "one object over many lines": (
        "a.json",
        json.dumps({"prompt": "a?", "completion": "b"}, indent=2).encode(),
        TWO[:1],
    ),
    "lines, called .json": ("a.json", lines(end="\r\n"), TWO),
    "one line, called .json": ("a.json", lines(TWO[0]), TWO[:1]),
    "a table": ("a.csv", table(), TWO),
    "a table with other columns and line ends": (
        "a.CSV",
        table(end="\n", columns=(" completion", "id", "prompt "), pairs=[("b", "7", "a?")]),
        TWO[:1],
    ),
    "line ends of old Macs": ("a.csv", table(end="\r"), TWO),
    "a table from a spreadsheet": ("a.csv", codecs.BOM_UTF8 + table() + b"\r\n", TWO),
    "separators, quotes and line ends in texts": (
        "a.csv",
        table(pairs=[('say "a",\nb', f"x,{ODD}")]),
        [('say "a",\nb', f"x,{ODD}")],
    ),
    "a table with tabs": ("a.tsv", table("\t", pairs=[("a, b\tc", "d")]), [("a, b\tc", "d")]),
    "a text of two hundred thousand characters": (
        "a.csv",
        table(pairs=[("a?", "b" * 200_000)]),
        [("a?", "b" * 200_000)],
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_files_that_are_read(tmp_path, case):
    name, raw, expected = RIGHT[case]
    (tmp_path / name).write_bytes(raw)
    found = data.read_examples(tmp_path / name, TOKENIZER, 300_000)
    assert list(texts(found)) == expected


WRONG = {
    # What it is, its name, its contents, and the error.
    "an empty file": ("a.jsonl", b"", r"a\.jsonl is empty"),
    "blank lines alone": ("a.json", b"\n\r\n \n", r"a\.json is empty"),
    "a mark alone": ("a.csv", codecs.BOM_UTF8, r"a\.csv is empty"),
    "an empty list": ("a.json", b"[]", r"a\.json has no records"),
    "a table without rows": ("a.csv", table(pairs=[]), r"a\.csv has no records"),
    "no JSON": ("a.jsonl", b"\nno\n", r"line 2: each line must be \{\"prompt\".*got 'no'"),
    "a last line cut off": (
        "a.jsonl",
        lines()[:-4],
        r"line 2: each line must be .*no JSON \(Unterminated string.*is it cut off\?; got",
    ),
    "a list cut off": ("a.json", listed(indent=2)[:-9], r"must be a list.*no JSON.*line \d"),
    "a table cut off": ("a.csv", table(pairs=[("a?", "b, c")])[:-4], "line 2: unexpected end"),
    "a missing key": ("a.jsonl", b'{"prompt": "a?"}', "line 1.*completion is missing"),
    "keys in capitals": (
        "a.json",
        b'[{"Prompt": "a?", "Completion": "b"}]',
        "record 1: a record must have messages, or prompt and completion, or .* got .'Prompt'",
    ),
    "a conversation in two": (
        "a.jsonl",
        b'{"prompt": [{"role": "user", "content": "a?"}], "completion": []}',
        r"line 1: prompt is a list: write a conversation as one list, .*messages.*got \[",
    ),
    "a list within an object": ("a.json", b'{"data": []}', "record 1.*got {'data'"),
    "a list per line": ("a.jsonl", b'["a?", "b"]', r"line 1: each line must be.*got \['a\?"),
    "texts that are numbers": (
        "a.jsonl",
        lines() + b'{"prompt": "a?", "completion": 2}',
        "line 3.*completion is no text; got 2",
    ),
    "a text that is null": ("a.json", listed([("a?", None)]), "record 1.*no text; got None"),
    "an empty prompt": ("a.csv", table(pairs=[("", "b")]), "line 2: the prompt must not be empty"),
    "half of a character": (
        "a.jsonl",
        lines() + b'{"prompt": "a?", "completion": "so \\ud83d"}',
        r"line 3: completion has a lone surrogate, \\ud83d, .*after 'so '",
    ),
    "nested too deeply": ("a.jsonl", b"[" * 200_000, r"line 1.*nested too deeply"),
    "the same in one list": ("a.json", b"[" * 200_000, "nested too deeply"),
    "a number too long": ("a.jsonl", b"1" * 5000, "line 1.*a number too long"),
    "Latin letters of Windows": (
        "a.jsonl",
        lines() + '{"prompt": "é?"}'.encode("cp1252"),
        r"a\.jsonl, line 3: no text in UTF-8 .*byte 0xe9",
    ),
    "UTF-16": ("a.csv", table().decode().encode("utf-16"), "is no text in UTF-8, but in UTF-16"),
    "UTF-16 without its mark": (
        "a.csv",
        table().decode().encode("utf-16-le"),
        "line 1: no text in UTF-8, for it has zero bytes",
    ),
    "other columns": ("a.csv", b"question,answer\na?,b\n", r"got \['question', 'answer'\]"),
    "no line with names": ("a.csv", b"a?,b\nc?,d e\n", r"first line must name.*got \['a\?', 'b'\]"),
    "a column twice": ("a.csv", b"prompt,prompt,completion\n1,2,3\n", "once among them"),
    "another separator": ("a.csv", table(";"), r"separated by ','.*got \['prompt;completion'\]"),
    "a comma that is not quoted": ("a.csv", table() + b"e?,f, g\r\n", "line 4: 3 columns, where"),
    "a row that is short": ("a.tsv", table("\t") + b"e?\n", "line 4: 1 columns, where"),
    "a quote that is not doubled": ("a.tsv", table("\t") + b'"e"?\tf\n', "line 4.*doubled"),
    "a pointer instead of the file": (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "pointer of Git LFS",
    ),
    "a table for other programs": ("a.arrow", b"ARROW1", r"must hold records \(\.jsonl.*\.arrow"),
    "no Parquet": ("a.parquet", b"PAR1", r"a\.parquet is no Parquet file that can be read"),
    "Parquet with other columns": (
        "a.parquet",
        parquet(q="a?"),
        "record 1: .* instruction and output, or text; got .'q'",
    ),
    "Parquet with an empty place": (
        "a.parquet",
        parquet(prompt="a?", completion=None),
        "record 1: .*completion is no text; got None",
    ),
    "compressed lines": ("a.jsonl.gz", b"\x1f\x8b", r"\.gz is neither"),
    "a list in another notation": ("a.YAML", b"- prompt: a?\n", r"\.yaml is neither"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_refused(tmp_path, case):
    name, raw, message = WRONG[case]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message) as caught:
        data.read_examples(tmp_path / name, TOKENIZER, 64)
    # Whatever is in the file, the message is short, and can be printed.
    assert len(str(caught.value).encode()) < 600 + len(str(tmp_path))


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*a\.jsonl"):
        data.read_examples(tmp_path / "a.jsonl", TOKENIZER, 64)
    (tmp_path / "a.jsonl").mkdir()
    for read in (data.read_text, data.read_pairs):
        with pytest.raises(IsADirectoryError, match="is a folder; it must be a file"):
            read(tmp_path)
        with pytest.raises((IsADirectoryError, ValueError)):
            read(tmp_path / "a.jsonl")


def test_a_folder_is_all_of_its_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.jsonl").write_bytes(lines())
    (tmp_path / "a.parquet").write_bytes(parquet(text="alpha"))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.txt").write_text("no")
    found = data.read_examples(tmp_path, TOKENIZER, 64)
    each = [
        data.read_examples(tmp_path / name, TOKENIZER, 64) for name in ("a.parquet", "b/c.jsonl")
    ]
    assert found == each[0] + each[1]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="must have files that are not empty; it has none"):
        data.read_examples(tmp_path / "none", TOKENIZER, 64)


def test_empty_files_of_a_folder_are_left_out(tmp_path, caplog):
    for name in ("__init__.py", "a.py"):
        (tmp_path / name).write_text("" if "init" in name else "x = 1")
    (example,) = data.read_examples(tmp_path, TOKENIZER, 64)
    assert TOKENIZER.decode(example.tokens[:-1]) == "x = 1"
    assert "left out, of 2 files: 1 that are empty" in caplog.text
    (tmp_path / "a.py").unlink()
    with pytest.raises(ValueError, match="must have files that are not empty; it has none"):
        data.read_examples(tmp_path, TOKENIZER, 64)


def test_parquet_is_read_as_lines_are(tmp_path):
    rows = [{"prompt": f"{i}?", "completion": f"é {i}", "id": i} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.PARQUET").write_bytes(parquet(*rows))
    found = [data.read_examples(tmp_path / n, TOKENIZER, 64) for n in ("a.jsonl", "a.PARQUET")]
    assert found[0] == found[1]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chats.parquet").write_bytes(parquet(messages=messages))
    (talk,) = data.read_conversations(tmp_path / "chats.parquet")
    assert talk == ("record 1", messages, None)


def test_reading_leaves_the_csv_module_as_it_was(tmp_path):
    before = csv.field_size_limit()
    for raw in (table(), b"prompt\n"):
        (tmp_path / "a.csv").write_bytes(raw)
        with pytest.raises(ValueError, match="the first line must name the columns"):
            data.read_records(tmp_path / "a.csv", ("prompt", "other"))
    assert csv.field_size_limit() == before


def test_records_of_other_fields():
    found = data.parse_records(b"mr,ref\na,b\n", "trainset.csv", ("ref", "mr"))
    assert found == [data.Record("line 2", ("b", "a"))]
    with pytest.raises(ValueError, match=r"suffix must be one of \.jsonl.*got '\.txt'"):
        data.parse_records(b"a", "a.txt", ("ref",))


# ---------------------------------------------------------------------------------------------
# Plain text
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a", "a.TXT", "a.html", "a.2024"])
def test_other_suffixes_are_plain_text(tmp_path, name):
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + b"ab\r\ncd\ref")
    (found,) = data.read_examples(tmp_path / name, TOKENIZER, 64)
    assert TOKENIZER.decode(found.tokens) == "ab\ncd\nef"
    assert all(found.learned)
    assert data.read_text(tmp_path / name) == "ab\ncd\nef"


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.txt", b" \n", "is empty"),
        ("a.txt", b"a\nb\xff", r"line 2: no text in UTF-8 \(invalid start byte, byte 0xff\)"),
        ("a.txt", codecs.BOM_UTF8 + b"a\nb\xff", "line 2: no text in UTF-8"),
        ("a.txt", "a\nb".encode("utf-16"), "in UTF-16"),
        ("a.txt", b"\x7fELF\0\0", "line 1.*zero bytes"),
        ("a.json", b"{}", "its syntax would be learned"),
        ("a.CSV", b"a,b", "its syntax would be learned"),
    ],
)
def test_texts_that_are_none(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        data.read_text(tmp_path / name)


# ---------------------------------------------------------------------------------------------
# Texts that are too long
# ---------------------------------------------------------------------------------------------

MIXED = [("abc", "def"), ("abc", "defghijk"), ("abcdefghijkl", "mno"), ("abc", "d" * 20)]
"""Of which, with 8 tokens, the first fits, and the third's prompt leaves no room."""


def read_mixed(tmp_path, caplog, too_long, pairs=MIXED):
    (tmp_path / "a.jsonl").write_bytes(lines(*pairs))
    with caplog.at_level(logging.WARNING, "bdia_jax"):
        found = data.read_examples(tmp_path / "a.jsonl", TOKENIZER, 7, too_long=too_long)
    assert all(len(example.tokens) == len(example.learned) <= 8 for example in found)
    return found, [record.getMessage() for record in caplog.records]


def test_long_texts_are_truncated_unless_it_is_said_otherwise(tmp_path, caplog):
    found, told = read_mixed(tmp_path, caplog, "truncate")
    assert [TOKENIZER.decode(example.tokens) for example in found] == [
        "abcdef",
        "abcdefgh",
        "abcddddd",
    ]
    assert [sum(example.learned) for example in found] == [4, 5, 5]
    # Where the end is cut off, none is learned.
    assert [example.tokens[-1] == TOKENIZER.end for example in found] == [True, False, False]
    cut, left_out = told
    assert "2 texts are truncated to 8 tokens (length + 1): too_long, length (line 2 first)" in cut
    assert "1 text is left out, since the prompt alone has 8 tokens" in left_out
    assert "line 3 first" in left_out
    again = data.read_examples(tmp_path / "a.jsonl", TOKENIZER, 7)
    assert again == found


def test_long_texts_are_split(tmp_path, caplog):
    found, (told,) = read_mixed(tmp_path, caplog, "split")
    learned = [t for example in found for t, yes in zip(*example) if yes]
    # Every token of a completion once, also behind the prompt that is longer than a piece.
    assert TOKENIZER.decode(learned) == "".join(text for _, text in MIXED)
    assert learned.count(TOKENIZER.end) == len(MIXED)
    assert "3 texts are split into pieces of 8 tokens (length + 1)" in told
    # And every one after the token before it.
    assert not any(example.learned[0] for example in found)


def test_long_texts_are_refused(tmp_path, caplog):
    message = (
        r"line 2: the text has 12 tokens; allowed are 8 tokens \(length \+ 1\): give a larger "
        "length, a shorter text, or too_long = truncate, split or drop"
    )
    with pytest.raises(ValueError, match=message):
        read_mixed(tmp_path, caplog, "error")
    with pytest.raises(ValueError, match="truncate, split, drop, error; got 'cut'"):
        read_mixed(tmp_path, caplog, "cut")
    with pytest.raises(ValueError, match=r"no prompt leaves room .* 8 tokens \(length \+ 1\)"):
        read_mixed(tmp_path, caplog, "truncate", [("a" * 8, "b"), ("a" * 9, "c")])


def test_long_texts_are_dropped(tmp_path, caplog):
    (found,), (told,) = read_mixed(tmp_path, caplog, "drop")
    assert TOKENIZER.decode(found.tokens) == "abcdef"
    assert "3 texts are left out, of more than 8 tokens (length + 1)" in told
    assert "(line 2 first)" in told
    with pytest.raises(ValueError, match=r"a\.jsonl: every text has more than 8 tokens"):
        read_mixed(tmp_path, caplog, "drop", MIXED[1:])


def test_exactly_as_long_is_not_too_long(tmp_path, caplog):
    found, told = read_mixed(tmp_path, caplog, "error", [("abc", "defg")])
    assert (len(found[0].tokens), told) == (8, [])
    data.pack(found, 7)


def test_a_boundary_within_a_token_is_told(tmp_path, caplog):
    tokenizer = data.train_tokenizer(["yes no yes no " * 50], 300)
    (tmp_path / "a.jsonl").write_bytes(lines(("yes ", "no"), ("yes", " no")))
    with caplog.at_level(logging.WARNING, "bdia_jax"):
        apart, together = data.read_examples(tmp_path / "a.jsonl", tokenizer, 16)
    assert len(apart.tokens) == len(together.tokens) + 1
    (record,) = caplog.records
    assert "1 text is learned with a token of the prompt and one of the" in record.getMessage()
    assert "(line 1 first)" in record.getMessage()


# ---------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------

GO = [("Go.", "Va !"), ("Hi.", "Salut.")]
GO_LINES = b"Go.\tVa !\tCC-BY 2.0\nHi.\tSalut.\n"


def zipped(*files, **options):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:
        for name, raw in files:
            archive.writestr(name, raw)
    return stream.getvalue()


def locked():
    """A zip that says that its file is encrypted."""
    raw = bytearray(zipped(("a.txt", GO_LINES)))
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(signature) + at] |= 1
    return bytes(raw)


def damaged():
    raw = bytearray(zipped(("a.txt", GO_LINES * 50), compression=zipfile.ZIP_DEFLATED))
    raw[40:60] = bytes(20)
    return bytes(raw)


PAIRS = {
    # What it is, its name, its contents, and the pairs, or the error.
    "as documented": ("a.txt", GO_LINES, GO),
    "without a suffix": ("a", GO_LINES, GO),
    "with tabs": ("a.TSV", GO_LINES, GO),
    "line ends of Windows, and a mark": (
        "a.txt",
        codecs.BOM_UTF8 + GO_LINES.replace(b"\n", b"\r\n"),
        GO,
    ),
    "line ends of old Macs": ("a.txt", GO_LINES.replace(b"\n", b"\r"), GO),
    "two files with marks in one": ("a.txt", 2 * (codecs.BOM_UTF8 + GO_LINES), 2 * GO),
    "U+2028 in a text": ("a.txt", f"a{ODD}\tb{ODD}\n".encode(), [("a" + ODD, "b" + ODD)]),
    "an empty side": ("a.txt", b"a\t\n\tb\n", [("a", ""), ("", "b")]),
    "a zip": ("a.zip", zipped(("_about.txt", b"of"), ("b/fra.txt", GO_LINES)), GO),
    "capitals": ("A.ZIP", zipped(("FRA.TXT", GO_LINES)), GO),
    "an empty file": ("a.txt", b"\n \n", r"a\.txt is empty"),
    "a line without a tab": ("a.txt", GO_LINES + b"c\n", "line 3: a line must be a text, a tab"),
    "another encoding": ("a.txt", GO_LINES + b"caf\xe9\tb", "line 3: no text in UTF-8"),
    "UTF-16": ("a.txt", GO_LINES.decode().encode("utf-16"), "in UTF-16"),
    "records": ("a.jsonl", lines(), r"pairs must be in a file of lines.*got \.jsonl"),
    "a table": ("a.csv", table(), r"pairs must be in a file of lines.*got \.csv"),
    "a table for other programs": ("a.parquet", b"PAR1", r"pairs must be in a file of lines"),
    "a list with numbers": (
        "a.tsv",
        b"12\tGo.\t34\tVa !\n15\tHi.\t36\tSalut.\n",
        "numbers before both.*keep the second and the fourth",
    ),
    "two files in a zip": (
        "a.zip",
        zipped(("a.txt", GO_LINES), ("b.tsv", GO_LINES)),
        r"must hold one \.txt or \.tsv file; it holds \['a\.txt', 'b\.tsv'\]",
    ),
    "none in a zip": ("a.zip", zipped(("a.csv", b"a,b")), "it holds none"),
    "no zip": ("a.zip", GO_LINES, "is no zip file"),
    "a zip cut off": ("a.zip", zipped(("a.txt", GO_LINES))[:-30], "is no zip file"),
    "a zip that is damaged": ("a.zip", damaged(), "cannot be unpacked|is no zip file"),
    "a zip that is locked": ("a.zip", locked(), "cannot be unpacked.*encrypted"),
    "an error in a zip": (
        "a.zip",
        zipped(("fra.txt", b"Go.")),
        r"a\.zip, fra\.txt, line 1: a line must be",
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_files_of_pairs(tmp_path, case):
    name, raw, expected = PAIRS[case]
    (tmp_path / name).write_bytes(raw)
    if isinstance(expected, list):
        assert data.read_pairs(tmp_path / name) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            data.read_pairs(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name], "something was unpacked"


# ---------------------------------------------------------------------------------------------
# Fingerprints
# ---------------------------------------------------------------------------------------------


def packed(*pairs):
    return data.pack([data.completion(TOKENIZER, *pair) for pair in pairs], 16)


def test_a_fingerprint_is_of_names_dtypes_shapes_and_contents():
    a = {"x": np.arange(6, dtype=np.int32), "y": np.zeros((2, 0))}
    assert data.fingerprint(a) == data.fingerprint(
        {"y": a["y"].copy(), "x": np.r_[:6].astype("i4")}
    )
    # Of a view into another array, what is seen counts.
    assert data.fingerprint(np.arange(8)[::2]) == data.fingerprint(np.array([0, 2, 4, 6]))
    others = [
        {"x": a["x"].reshape(2, 3), "y": a["y"]},
        {"x": a["x"].view(np.float32), "y": a["y"]},
        {"z": a["x"], "y": a["y"]},
        {"x": a["x"][::-1], "y": a["y"]},
        {"x": a["x"], "y": a["y"].T},
        {"x": a["x"]},
        {},
    ]
    found = {data.fingerprint(tree) for tree in [a, *others]}
    assert len(found) == 8
    assert all(len(word) == 64 and int(word, 16) >= 0 for word in found)


def test_edited_data_have_another_fingerprint():
    assert packed(*TWO).fingerprint == packed(*TWO).fingerprint
    assert packed(*TWO).fingerprint != packed(TWO[0], ("c?", "d f")).fingerprint
    rows = [data.pack_pairs([([1, 2], [3])] * n, 4, end=0) for n in (3, 3, 4)]
    assert rows[0].fingerprint == rows[1].fingerprint != rows[2].fingerprint
    split = [data.split_text("a", text * 9, TOKENIZER) for text in ("abcd", "abcd", "abce")]
    assert split[0].fingerprint == split[1].fingerprint != split[2].fingerprint
