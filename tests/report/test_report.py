"""Reports from result files alone: every section that the data allow, and no more; broken files are told and skipped."""

import csv
import html.parser
import random
import re

import pytest
from PIL import Image
from recorded import pruned, trained, tuned, write

from slimming.config import ReportConfig
from slimming.errors import DataError
from slimming.report import collect, published, tables, words
from slimming.stages.reporting import report


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    for seed in (1, 2, 3):
        write(folder, f"base{seed}", trained("baseline", seed, 0.80 + 0.01 * seed, sparsity=0.0))
        write(folder, f"sparse{seed}", trained("sparse", seed, 0.79 + 0.01 * seed))
        write(folder, f"p{seed}", pruned(f"../sparse{seed}/last.ckpt", got=0.49 + 0.005 * seed))
        write(folder, f"ft{seed}", tuned(f"../p{seed}/pruned.ckpt", seed=seed, accuracy=0.78 + 0.01 * seed))
    for ratio in (0.1, 0.3, 0.7):
        write(folder, f"sweep/{ratio}", pruned("../../sparse1/last.ckpt", ratio, cost=int(1000 * (1 - ratio))))
    return folder


class Page(html.parser.HTMLParser):
    """Collects headings and what a page refers to; complains of tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.titles = [], [], {"h2": [], "h3": []}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in self.titles:
            self.titles[self.open[-1]].append(data)


def table_of(folder, title):
    """Return the first table of a section of report.md as a list of dicts."""
    text = next(t for t in re.split("\n##+ ", (folder / "report.md").read_text()) if t.splitlines()[0] == title)
    head, _, *rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_every_section(runs, tmp_path, capsys):
    report(ReportConfig(runs=str(runs), out=str(tmp_path / "out")))
    out = tmp_path / "out"
    page = Page((out / "report.html").read_text())
    assert page.titles["h2"] == ["vgg11 on digits, 1,000 parameters dense"]
    short = [
        "stages",
        "accuracy against the ratio",
        "architectures",
        "|gamma| after sparse training",
        "loss and accuracy",
    ]
    assert page.titles["h3"] == short
    assert re.findall("^##+ (.*)$", (out / "report.md").read_text(), re.MULTILINE) == [*page.titles["h2"], *short]
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert "http" not in (out / "report.html").read_text().replace("<!DOCTYPE html>", "")
    assert sum(link.startswith("data:") for link in page.links) == len(list((out / "figures").iterdir()))
    for picture in (out / "figures").iterdir():
        Image.open(picture).verify()
    stages = {row["network"]: row for row in table_of(out, "stages")}
    assert stages["baseline"]["test accuracy (%)"] == "82.00 ± 1.00 (n=3)"
    assert stages["sparse"]["test accuracy (%)"] == "81.00 ± 1.00 (n=3)"
    assert stages["sparse"]["setting"] == "lambda 0.0001, 3 epochs" and stages["baseline"]["setting"] == "3 epochs"
    assert stages["pruned, ratio 0.5: before calibration"]["test accuracy (%)"] == "5.00 ± 0.00 (n=3)"
    fine = stages["pruned, ratio 0.5: fine-tuned, 3 epochs"]
    assert fine["test accuracy (%)"] == "80.00 ± 1.00 (n=3)" and fine["channels removed"] == "50.0%"
    assert fine["parameters"] == "400 (-60.0%)" and fine["MACs (M)"] == "0.02 (-60.0%)" and fine["FLOPs (M)"] == "0.04"
    assert fine["latency (ms)"] == "10.0 -> 5.0" and stages["baseline"]["latency (ms)"] == "-"
    ratios = table_of(out, "accuracy against the ratio")
    assert [row["asked"] for row in ratios] == ["0.1", "0.3", "0.5", "0.7"]
    assert [row["fine-tuned (%)"] for row in ratios] == ["-", "-", "80.00 ± 1.00 (n=3)", "-"]
    assert [row["restored"] for row in ratios] == ["2"] * 4
    with (out / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 15 and tuple(lines[0]) == tables.CSV
    assert {line["run"] for line in lines} >= {"base1", "sweep/0.1"}
    shown = capsys.readouterr().out
    assert "80.00 ± 1.00 (n=3)" in shown and str(out / "report.html") in shown
    assert shown.count("vgg11 on digits") == 1 and "60% fewer parameters" in shown


def test_only_repetitions_of_one_experiment_are_averaged(tmp_path):
    for name, seed, epochs, accuracy in (("a", 1, 3, 0.5), ("b", 2, 3, 0.7), ("c", 3, 4, 0.9), ("again", 1, 3, 0.5)):
        config = {"sparsity": 1e-4, "seed": seed, "trainer": {"max_epochs": epochs}}
        write(tmp_path, name, trained("sparse", seed, accuracy, epochs, config=config))
    report(ReportConfig(runs=str(tmp_path)))
    rows = {r["setting"]: r["test accuracy (%)"] for r in table_of(tmp_path, "stages")}
    assert rows == {"lambda 0.0001, 3 epochs": "60.00 ± 14.14 (n=2)", "lambda 0.0001, 4 epochs": "90.00"}


def test_what_does_not_matter_to_the_result_makes_no_other_experiment(tmp_path):
    for seed, bar, workers, size in ((1, True, 0, 256), (2, False, 4, 256), (3, True, None, 64)):
        config = {"sparsity": 1e-4, "seed": seed, "trainer": {"enable_progress_bar": bar, "profiler": None}}
        config["data"] = {"seed": seed, "num_workers": workers, "eval_batch_size": size}
        write(tmp_path, f"run{seed}", trained("sparse", seed, 0.6 + 0.1 * seed, config=config))
    report(ReportConfig(runs=str(tmp_path)))
    assert [r["test accuracy (%)"] for r in table_of(tmp_path, "stages")] == ["80.00 ± 10.00 (n=3)"]


def test_other_data_and_unknown_origins_are_no_repetitions(tmp_path):
    for name, seed, root in (("a", 1, "/x/cats"), ("b", 2, "/y/cats"), ("c", 3, "/x/dogs")):
        config = {"sparsity": 1e-4, "seed": seed, "data": {"root": root, "seed": seed}}
        write(tmp_path, name, trained("sparse", seed, config=config))
    for name in "de":
        write(tmp_path, name, pruned(f"../gone-{name}/last.ckpt"))
    write(tmp_path, "f", pruned("../a/last.ckpt", None, got=0.3) | {"ratio": {"asked": None, "got": 0.3}})
    write(tmp_path, "g", pruned("../a/last.ckpt", 0.3))
    report(ReportConfig(runs=str(tmp_path)))
    rows = table_of(tmp_path, "stages")
    assert [r["test accuracy (%)"] for r in rows if r["network"].startswith("sparse")] == [
        "80.00 ± 0.00 (n=2)",
        "80.00",
    ]
    assert sum("from a run that is not here" in r["network"] and "calibrated" in r["network"] for r in rows) == 2


def test_sections_without_data_are_left_out(tmp_path):
    result = trained("baseline")
    for key in ("history", "gammas", "activation_bytes", "widths"):
        del result[key]
    write(tmp_path, "a", result)
    report(ReportConfig(runs=str(tmp_path)))
    assert Page((tmp_path / "report.html").read_text()).titles["h3"] == ["stages"]


def test_troubles_are_told_and_skipped(runs, capsys):
    write(runs, "bad/half", '{"format": 1, "status": "fin')
    write(runs, "bad/foreign", {"loss": 1})
    write(runs, "bad/list", "[1, 2]")
    write(runs, "bad/newer", {"format": 2})
    write(runs, "bad/partial", {"format": 1, "status": "finished", "role": "sparse", "model": "x"})
    write(runs, "bad/role", trained("king"))
    write(runs, "bad/cost", trained("sparse") | {"cost": {"macs": "many"}})
    write(runs, "bad/bins", trained("sparse") | {"gammas": {"edges": [0, 1, 2], "counts": [[1, 2, 3]]}})
    write(runs, "bad/history", trained("sparse") | {"history": [{"train/loss": 1.0}]})
    write(runs, "bad/widths", trained("sparse") | {"widths": [8, "P"]})
    write(runs, "bad/latency", pruned("../base1/last.ckpt") | {"latency_ms": {"before": 0, "after": 1}})
    write(runs, "bad/parent", trained("sparse") | {"parent": "a\0b"})
    for name, sparsity in (("lambda", "much"), ("target", "auto")):
        sparse = trained("sparse")
        write(runs, f"bad/{name}", sparse | {"config": sparse["config"] | {"sparsity": sparsity}})
    write(runs, "bad/binary", "x")
    (runs / "bad/binary/result.json").write_bytes(b"\xff\xfe\x00")
    write(runs, "died", {"format": 1, "status": "failed", "stage": "prune", "error": "ratio must lie in [0, 1) | <b>"})
    report(ReportConfig(runs=str(runs)))
    text = (runs / "report.md").read_text().split("## What failed")[1]
    assert text.count("bad/") == 15 and "ratio must lie in [0, 1) \\| <b>" in text
    page = (runs / "report.html").read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert "died: prune failed: ratio must lie in [0, 1)" in capsys.readouterr().out


def test_a_training_that_diverged_is_reported(tmp_path):
    rows = [row | {"train/loss": float("nan"), "test/loss": float("nan")} for row in trained("sparse")["history"]]
    write(tmp_path, "a", trained("sparse", history=rows))
    report(ReportConfig(runs=str(tmp_path)))
    assert len(table_of(tmp_path, "stages")) == 1 and "loss and accuracy" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("content", [None, {"x": 1}])
def test_nothing_to_report(content, tmp_path):
    if content is not None:
        write(tmp_path, "a", content)
    with pytest.raises(DataError, match=r"holds no result\.json"):
        report(ReportConfig(runs=str(tmp_path)))
    with pytest.raises(DataError, match="is not a folder"):
        report(ReportConfig(runs=str(tmp_path / "nowhere")))
    assert not (tmp_path / "report.md").exists()


def test_a_missing_parent_is_said_and_circles_are_cut(tmp_path):
    write(tmp_path, "ft", tuned("../gone/pruned.ckpt"))
    write(tmp_path, "x", tuned("../y/last.ckpt"))
    write(tmp_path, "y", tuned("../x/last.ckpt"))
    report(ReportConfig(runs=str(tmp_path)))
    assert "from a run that is not here: fine-tuned" in (tmp_path / "report.md").read_text()


def test_published_numbers_stand_beside_the_same_network_and_data_only(tmp_path):
    full = {"cost": {"num_params": 20_035_018, "macs": 400_000_000}, "model": "vgg19", "data": "cifar10"}
    write(tmp_path / "a", "run", trained("baseline") | full)
    write(tmp_path / "b", "run", trained("baseline") | full | {"data": "imagefolder"})
    write(tmp_path / "c", "run", trained("baseline") | full | {"cost": {"num_params": 1_255_546, "macs": 1}})
    for name in "abc":
        report(ReportConfig(runs=str(tmp_path / name)))
    texts = [(tmp_path / name / "report.md").read_text() for name in "abc"]
    assert ["Published by others, not measured here" in t for t in texts] == [True, False, False]
    assert "93.66" in texts[0] and "32.54" in texts[0]
    assert all(len(row) == 6 for rows in published.PUBLISHED.values() for row in rows)


def test_moved_trees_keep_their_links(runs, tmp_path):
    moved = tmp_path / "elsewhere"
    runs.rename(moved)
    found = collect.collect(moved)
    assert sum(run.parent is not None for run in found.runs) == 9
    chain = next(r for r in found.runs if r.role == "finetuned").chain
    assert [r.role for r in chain] == ["sparse", "pruned", "finetuned"]


def test_an_old_picture_does_not_stay(runs):
    (runs / "figures").mkdir()
    (runs / "figures" / "curves_old.png").write_bytes(b"")
    (runs / "figures" / "mine.png").write_bytes(b"")
    report(ReportConfig(runs=str(runs)))
    assert not (runs / "figures" / "curves_old.png").exists() and (runs / "figures" / "mine.png").exists()


def test_natural_order():
    names = [f"sweep/{i}_ratio" for i in range(12)]
    from pathlib import Path

    shuffled = random.Random(0).sample(names, 12)
    assert sorted(shuffled, key=lambda n: collect._natural(Path(n))) == names


def test_percent():
    assert [words.percent(v) for v in ([], [None], [0.5], [0.5, 0.6])] == ["-", "-", "50.00", "55.00 ± 7.07 (n=2)"]
