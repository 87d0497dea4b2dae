"""One table in four formats; one document in two."""

import csv
import io

from slimming.report.document import Section, Table, markdown, page

TABLE = Table(["name", "value (%)"], [["a|b", 1], ["<c>, d", "22.50"]])


def test_markdown_of_a_table():
    assert TABLE.markdown() == "| name | value (%) |\n|---|---:|\n| a\\|b | 1 |\n| <c>, d | 22.50 |"


def test_html_of_a_table():
    text = TABLE.html()
    assert '<th class="left">name</th><th>value (%)</th>' in text
    assert '<tr><td class="left">&lt;c&gt;, d</td><td>22.50</td></tr>' in text


def test_text_of_a_table():
    assert TABLE.text() == "name    value (%)\na|b             1\n<c>, d      22.50"


def test_csv_of_a_table():
    assert [*csv.reader(io.StringIO(TABLE.csv()))] == [TABLE.head, ["a|b", "1"], ["<c>, d", "22.50"]]


def test_some_columns_of_a_table():
    table = Table(["a", "b", "c"], [[1, 2, 3]], left=2).columns(["c", "b"])
    assert (table.head, table.rows, table.left) == (["c", "b"], [[3, 2]], 1)


def test_the_headline_stands_under_the_title_and_before_all_else(tmp_path):
    made = [Section("one", ["text"], [Section("below", [TABLE])], "80% fewer"), Section("two", headline="5% fewer")]
    text = markdown("All", made, tmp_path)
    assert text.startswith(
        "# All\n\n* one: 80% fewer\n* two: 5% fewer\n\n## one\n\n**80% fewer**\n\ntext\n\n### below\n\n| name"
    )
    assert "* one" not in markdown("All", made[:1], tmp_path)  # a list of one would say it twice
    html = page("All", made)
    assert html.index('<a href="#s1">two</a>: 5% fewer') < html.index(
        '<h2 id="s0">one</h2>\n<p class="headline">80% fewer</p>'
    )
    assert "<nav>" not in page("All", made[:1])
