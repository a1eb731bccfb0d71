"""The Chinese README and catalogues follow the English pages: nothing missing, stale, or changed in code and maths."""

import ast
import importlib.util
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS, CATALOGUES = ROOT / "docs", ROOT / "docs" / "locale" / "zh_CN" / "LC_MESSAGES"
NAMES = ["index", *sorted(f"tutorial/{path.stem}" for path in (DOCS / "tutorial").glob("*.md"))]
FENCE = re.compile(r"^```(.*)\n([\s\S]*?)^```$", re.M)
FORMULA = re.compile(r"^\$\$(.*?)\$\$$", re.M | re.S)
ENTRY = re.compile(r'((?:^#.*\n)*)^msgid ((?:".*"\n)+)msgstr ((?:".*"\n?)+)', re.M)
UNCHANGED = re.compile(  # the target of a role, code, maths, the target of a link
    r"\{\w+\}`[^`<]*(<[^>]+>)`|(`[^`]+`)|(\$[^$]+\$)|(\]\([^)]+\))"
)
MYST = "myst_enable_extensions = ['amsmath', 'colon_fence', 'deflist', 'dollarmath']\n"  # as in docs/conf.py
CROWDED = re.compile(r"[\u4e00-\u9fff][A-Za-z0-9`$]|[A-Za-z0-9`$][\u4e00-\u9fff]|[\u4e00-\u9fff] ?[,.;:!?()]")


def read(path):
    return path.read_text(encoding="utf-8")


def unchanged(text):
    """What a translation must not touch, in some order."""
    return sorted("".join(groups) for groups in UNCHANGED.findall(text))


def crowded(text):
    """Where a Chinese character stands next to a Latin one without a space, or before Western punctuation."""
    outside = re.sub(r"\{\w+\}`[^`]*`|\]\([^)]*\)", "，", text)
    pieces = re.split(r"(`[^`]*`|\$[^$]*\$)", outside)  # every second one is code or maths: only its borders count
    return CROWDED.findall("".join(piece if i % 2 == 0 else piece[0] * 2 for i, piece in enumerate(pieces)))


# --- catalogues: gettext's files, one a page ------------------------------------------------------------------------


def messages(page):
    """What Sphinx translates of a page: captions, headings, cells, items, paragraphs, displayed formulas; no fence."""
    found = re.findall(r"^:caption: (.+)$", page, re.M)
    for block in re.split(r"\n\s*\n", FENCE.sub("\n\n", page)):
        lines = block.strip().splitlines()
        if FORMULA.match(block.strip()):
            found.append(FORMULA.match(block.strip())[1].strip("\n"))
        elif block.strip().startswith("|"):
            cells = (cell.strip() for line in lines for cell in line.strip("|").split("|"))
            found += [cell for cell in cells if set(cell) - set("-:")]
        else:
            parts = re.split(r"^(?:#+|\*) ", "\n".join(lines), flags=re.M)
            found += [" ".join(part.split()) for part in parts if part.strip()]
    return dict.fromkeys(found)


def catalogue(text):
    """The entries of a .po file: {message: (comments, translation)}."""

    def joined(lines):
        return "".join(map(ast.literal_eval, lines.splitlines()))

    return {joined(message): (comments, joined(words)) for comments, message, words in ENTRY.findall(text)}


def problems(page, po):
    """What is wrong with a page's catalogue, in words."""
    entries = {message: entry for message, entry in catalogue(po).items() if message}  # the empty one is the header
    wanted, displayed = messages(page), [formula.strip("\n") for formula in FORMULA.findall(page)]
    found = [f"not translated: {message}" for message in wanted if not entries.get(message, ("", ""))[1]]
    found += [f"the page no longer says: {message}" for message in entries if message not in wanted]
    found += ["obsolete entries (#~)"] if "#~" in po else []
    for message, (comments, words) in entries.items():
        if "fuzzy" in comments:
            found.append(f"fuzzy: {message}")
        if words and (words != message if message in displayed else unchanged(words) != unchanged(message)):
            found.append(f"code, maths or a link differs: {message}")
        if message not in displayed and crowded(words):
            found.append(f"spacing or punctuation, {crowded(words)}: {words}")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_message_is_translated(name):
    assert problems(read(DOCS / f"{name}.md"), read(CATALOGUES / f"{name}.po")) == []


def test_there_is_no_catalogue_of_nothing():
    assert {str(path.relative_to(CATALOGUES).with_suffix("")) for path in CATALOGUES.rglob("*.po")} == set(NAMES)


PAGE = """# Title

One `x` of $y$,
see [it](there.md).

* an
  item
* another

$$ a = b $$

```{literalinclude} code.py
:language: python
```

| a | b |
|---|---|
| c | d |
"""
SEEN = ["Title", "One `x` of $y$, see [it](there.md).", "an item", "another", " a = b ", "a", "b", "c", "d"]
GOOD = ["标题", "$y$ 的 `x`，见[这里](there.md)。", "一项", "另一项", " a = b ", "甲", "乙", "丙", "丁"]
PO = "".join(f'\nmsgid "{message}"\nmsgstr "{words}"\n' for message, words in zip(SEEN, GOOD, strict=True))


def test_what_is_read_of_a_page():
    assert list(messages(PAGE)) == SEEN
    assert list(messages("```{toctree}\n:caption: Learn\nfirst\n```\n")) == ["Learn"]
    assert {message: words for message, (_, words) in catalogue(PO).items()} == dict(zip(SEEN, GOOD, strict=True))
    assert catalogue('#, fuzzy\nmsgid ""\n"a \\\\bar"\nmsgstr "甲"\n') == {"a \\bar": ("#, fuzzy\n", "甲")}
    assert problems(PAGE, PO) == []


@pytest.mark.parametrize("old, new, story", [
    ('msgid "Title"\nmsgstr "标题"\n', "", "not translated: Title"),
    ("标题", "", "not translated: Title"),
    ("an item", "the item", "the page no longer says: the item"),
    ('msgid "Title"', '#~ msgid "Old"\n#~ msgstr "旧"\n\nmsgid "Title"', "obsolete entries (#~)"),
    ('msgid "Title"', '#, fuzzy\nmsgid "Title"', "fuzzy: Title"),
    ("的 `x`", "的 `z`", "code, maths or a link differs: One `x` of $y$, see [it](there.md)."),
    ("$y$ 的", "$z$ 的", "code, maths or a link differs: One `x` of $y$, see [it](there.md)."),
    ("里](there.md)", "里](here.md)", "code, maths or a link differs: One `x` of $y$, see [it](there.md)."),
    ('msgstr " a = b "', 'msgstr " a = c "', "code, maths or a link differs:  a = b "),
    ("的 `x`", "的`x`", "spacing or punctuation, ['的`']: $y$ 的`x`，见[这里](there.md)。"),
    ("另一项", "另一项, 完", "spacing or punctuation, ['项,']: 另一项, 完"),
])  # fmt: skip
def test_a_catalogue_with_something_wrong(old, new, story):
    assert old in PO and story in problems(PAGE, PO.replace(old, new, 1))


@pytest.mark.parametrize("text, found", [
    ("用 `x` 和 $y$ 做 NumPy（好）。", []), ("一个{doc}`族 </judge>`，[见此](#here)。", []), ("`f(x) 值, 中`", []),
    ("用NumPy", ["用N"]), ("$y$是", ["$是"]), ("共 3个", ["3个"]), ("对.", ["对."]), ("是 (好", ["是 ("]),
])  # fmt: skip
def test_spacing(text, found):
    assert crowded(text) == found


def test_sphinx_extracts_the_same(tmp_path):
    """What `messages` reads, by hand so that it needs no Sphinx, is what Sphinx looks up in the catalogues."""
    for package in ("sphinx", "myst_parser"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'refattn[docs]'")
    source, built = tmp_path / "source", tmp_path / "built"
    for name in NAMES:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / f"{name}.md").write_bytes((DOCS / f"{name}.md").read_bytes())
    (source / "conf.py").write_text("extensions, gettext_compact = ['myst_parser'], False\n" + MYST)
    command = [sys.executable, "-m", "sphinx", "-Q", "-b", "gettext", source, built]  # -Q: links lead out of the folder
    subprocess.run(command, check=True, timeout=120)
    for name in NAMES:
        template = re.sub(r"^#.*\n", "", read(built / f"{name}.pot"), flags=re.M)
        assert catalogue(template).keys() - {""} == messages(read(DOCS / f"{name}.md")).keys()


# --- README ---------------------------------------------------------------------------------------------------------


def without_comments(code):
    """The code of a Python fence, comments and the blanks before them taken out."""
    lines = code.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return [line.rstrip() for line in lines]


def differences(english, chinese):
    """Where the Chinese README does not follow the English one, in words."""

    def fences(text):
        return [(of, without_comments(code) if of == "python" else code) for of, code in FENCE.findall(text)]

    def levels(text):
        return re.findall(r"^(#+) ", FENCE.sub("", text), re.M)

    prose = FENCE.sub("", english), FENCE.sub("", chinese)
    theirs, ours = (unchanged(text.replace("README.zh-CN.md", "README.md")) for text in prose)
    found = ["fences"] if fences(english) != fences(chinese) else []
    found += ["headings"] if levels(english) != levels(chinese) else []
    found += [f"lacks {part}" for part in theirs if part not in ours]
    return found + [f"spacing or punctuation: {crowded(line)}" for line in prose[1].splitlines() if crowded(line)]


def test_the_chinese_readme_follows_the_english_one():
    english, chinese = read(ROOT / "README.md"), read(ROOT / "README.zh-CN.md")
    assert "](README.zh-CN.md)" in english and "](README.md)" in chinese
    assert differences(english, chinese) == []


@pytest.mark.parametrize("old, new, story", [
    ("x = 1", "x = 2", "fences"),
    ("$ ls", "$ ll", "fences"),
    ("## 二", "### 二", "headings"),
    ("`b`", "`c`", "lacks `b`"),
    ("](b.md)", "](c.md)", "lacks ](b.md)"),
    ("见 `b`", "见`b`", "spacing or punctuation: ['见`']"),
])  # fmt: skip
def test_a_readme_that_does_not(old, new, story):
    text = "```text\n$ ls\n# no comment\n```\n"
    english = "# A\n\n```python\nx = 1  # one\n```\n\n## B\n\n`b`, [see](b.md)\n\n" + text
    chinese = "# 一\n\n```python\nx = 1    # 壹\n```\n\n## 二\n\n见 `b`、[彼](b.md)\n\n" + text
    assert differences(english, chinese) == []
    assert old in chinese and differences(english, chinese.replace(old, new)) == [story]
