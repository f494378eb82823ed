"""Templates: which columns become which segments."""

import pytest

from multidiff.data.sources import Template

ROW = {
    "caption": "a seven",
    "other": "the digit 7",
    "captions": ["one", "two"],
    "image": {"bytes": b"png", "path": "7.png"},
    "pages": [{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}],
    "label": "seven",
    "empty": None,
    "none": [],
    "messages": [{"role": "user", "content": "hi"}, {"from": "assistant", "value": "yo"}],
}
IMAGE = ("image", ROW["image"], "image")


@pytest.mark.parametrize(
    ("template", "documents"),
    [
        ([{"text": "caption"}, {"image": "image"}], [[("text", "a seven", "text"), IMAGE]]),
        ([{"image": "image"}, {"text": "caption", "label": "answer"}], [[IMAGE, ("text", "a seven", "answer")]]),
        ([{"image": "pages"}], [[("image", page, "image") for page in ROW["pages"]]]),
        ([{"text": "a {label}, {other}"}], [[("text", "a seven, the digit 7", "text")]]),
        (
            [{"text": "captions", "wordings": True}, {"image": "image"}],
            [[("text", word, "text"), IMAGE] for word in ("one", "two")],
        ),
        (
            [{"text": ["caption", "other", "empty"], "wordings": True}],
            [[("text", "a seven", "text")], [("text", "the digit 7", "text")]],
        ),
        ([{"text": "messages", "chat": True}], [[("text", "hi", "user"), ("text", "yo", "assistant")]]),
        ([{"text": "empty", "optional": True}, {"image": "image"}], [[IMAGE]]),
        ([{"text": "none", "optional": True}, {"text": "no {empty}", "optional": True}, {"image": "image"}], [[IMAGE]]),
        ([{"text": "absent", "optional": True}, {"text": "caption"}], [[("text", "a seven", "text")]]),
        (
            [{"text": "captions", "wordings": True}, {"text": ["caption", "other"], "wordings": True, "label": "b"}],
            [[("text", a, "text"), ("text", b, "b")] for a in ("one", "two") for b in ("a seven", "the digit 7")],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_documents_of_a_row(template, documents):
    assert Template.of(template).documents(ROW) == documents


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([{"text": "empty"}], "column 'empty' is empty. Fill it, or set optional: true for 'text'"),
        ([{"text": "none"}], "column 'none' is empty"),
        ([{"text": "a {empty} {label}"}], "column 'empty' is empty"),
        ([{"text": ["empty", "none"], "wordings": True}], "column 'empty', 'none' is empty"),
        ([{"text": "empty", "optional": True}], "all columns of the template are empty"),
        ([{"text": "captions", "chat": True}], "a turn of a chat must have a role and a content, got 'one'"),
    ],
    ids=str,
)
def test_rows_that_are_no_documents(template, message):
    with pytest.raises(ValueError, match=message):
        Template.of(template).documents(ROW)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([], "A template is a list of rows"),
        ("caption", "A template is a list of rows"),
        ([{"text": "a", "image": "b"}], "row 0: expected one tokenizer name and its column"),
        ([{"text": "a"}, "b"], "row 1: expected one tokenizer name and its column"),
        ([{"text": 7}], "the column of 'text' must be a name or a list of names, not 7"),
        ([{"text": []}], "must be a name or a list of names"),
        ([{"text": ["a", "b"]}], "several columns are wordings of the same. Set wordings: true"),
        ([{"text": "a", "optional": "yes"}], "optional must be true or false, not 'yes'"),
        ([{"text": "a", "label": "others"}], "a label must be a word other than 'others'"),
        ([{"text": "a", "chat": True, "label": "b"}], "a chat has no wordings, and its roles are its labels"),
        ([{"text": "a {} b"}], "names no column"),
        ([{"text": "{caption"}], "row 0: '{caption' is no text with columns in braces"),
        ([{"text": "{a:>5}"}], "formats a column. Only names of columns may stand in braces"),
        ([{"text": "{a!r}"}], "formats a column"),
        ([{"text": "{a:{b}}"}], "formats a column"),
        ([{"text": "{a}", "wordings": True}], "a text with columns in it stands alone"),
        ([{"text": ["{a}", "b"], "wordings": True}], "a text with columns in it stands alone"),
        ([{"text": "a", "labell": "b"}], "expected one tokenizer name and its column"),
    ],
    ids=str,
)
def test_bad_templates_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        Template.of(template)


def test_what_a_template_names_must_exist():
    template = Template.of([{"text": "caption"}, {"image": "picture"}, {"image": "more", "optional": True}])
    with pytest.raises(ValueError, match=r"t.csv has no column 'picture', which .* Its columns are caption, image."):
        template.check(["caption", "image"], ["text", "image"], "t.csv")
    with pytest.raises(
        ValueError, match=r"t.csv: the template names the tokenizer 'image'; the configuration has text"
    ):
        template.check(["caption", "picture"], ["text"], "t.csv")
    template.check(["caption", "picture"], ["text", "image"], "t.csv")
