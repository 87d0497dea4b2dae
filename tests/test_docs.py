"""What README.md and docs/ say holds: their links, their commands, their code, their numbers."""

import importlib.util
import re
import shlex
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import slimming
from conftest import ROOT, compose_config
from slimming import config

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "results").rglob("*.md"))]
SCRIPT = re.compile(r"(?:^|[ /])(train|prune|finetune|slim|export|bench|report)\.py(?= |$)")


def _blocks(path: Path) -> list[tuple[str, str]]:
    """Return (language, text) of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def _commands(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Return (stage, arguments) of the command lines in a page's blocks and in its inline code."""
    text = path.read_text()
    lines = [
        line for language, block in _blocks(path) if not language for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += [code for code in re.findall(r"`([^`\n]+)`", text) if code.startswith("python ")]
    found = []
    for line in lines:
        if match := SCRIPT.search(line):
            named = re.sub(r"<[^<>]*>", "x", line[match.end() :])  # `<run>/last.ckpt`
            words = [word for word in shlex.split(named, comments=True) if word != "..."]
            if line.startswith(("python ", "torchrun ", "srun ")) and not {"--help", "--cfg"} & set(words):
                found.append((match[1], tuple(word for word in words if word != "-m")))
    return found


def _first(argument: str) -> str:
    """Return an override with the first value of a sweep's list."""
    override = OverridesParser.create().parse_override(argument)
    if not override.is_sweep_override():
        return argument
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


COMMANDS = sorted({command for path in PAGES for command in _commands(path)})


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("path", LINKING, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_pictures_are_there(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))]
    missing = [t for t in targets if t and "://" not in t and not (path.parent / t).exists()]
    assert not missing


def test_every_page_of_docs_is_linked_in_the_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", README.read_text()))
    assert linked == {f"docs/{path.name}" for path in PAGES if path != README}


def test_the_page_of_options_is_up_to_date():
    spec = importlib.util.spec_from_file_location("options_page", ROOT / "docs" / "options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == (ROOT / "docs" / "options.md").read_text(), "run python docs/options.py"


def test_there_are_commands_of_every_stage():
    assert {stage for stage, _ in COMMANDS} == {"train", "prune", "finetune", "slim", "export", "bench", "report"}
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("stage", "arguments"), COMMANDS, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_every_command_composes(stage, arguments):
    if stage == "bench":  # as the script does
        arguments = config.lists_for_commas(arguments, ("models", "batch", "threads", "engines"))
    compose_config(*map(_first, arguments), name=stage)


def test_a_renamed_option_in_a_command_is_seen():
    with pytest.raises(Exception, match="sparsty"):
        compose_config(_first("sparsty=0,1e-4"), name="train")


def test_the_map_names_everything_in_the_package():
    source = ROOT / "src" / "slimming"
    there = {p.name + "/" * p.is_dir() for p in source.iterdir() if not p.name.startswith("__")}
    shown = next(block for _, block in _blocks(README) if "entry.py" in block)
    top = {name for name in re.findall(r"\b\w+(?:\.py|/)", shown)}
    assert there <= top


def test_numbers_of_the_result_table_are_measured_or_published():
    from slimming.report import published

    recorded = "\n".join(path.read_text() for path in (ROOT / "results").rglob("*.md"))
    recorded += Path(published.__file__).read_text()
    known = set(re.findall(r"\d+(?:\.\d+)?", recorded))
    rows = [line for line in README.read_text().splitlines() if line.startswith("|")][2:]
    cells = [cell for row in rows for cell in row.split("|")[2:]]
    shares = {"70", "60"}  # of the paper's rows, "70%" in published.py
    assert len(rows) >= 6
    assert {number for cell in cells for number in re.findall(r"\d+(?:\.\d+)?", cell)} <= known | shares


class Tiny(L.LightningModule):
    """A LightningModule of somebody's own."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
        self.model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

    def training_step(self, batch, index):
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class TinyData(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 3), 8)


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_readme_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module, datamodule, example_input = Tiny(), TinyData(), torch.randn(1, 1, 8, 8)
    names = {"module": module, "datamodule": datamodule, "example_input": example_input}
    blocks = [block for language, block in _blocks(README) if language == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (module.model, names["small"])]
    assert sizes[1] < sizes[0]
    assert torch.equal(names["again"](example_input), names["small"](example_input))
    assert str(names["plan"].describe()) in capsys.readouterr().out


def test_the_code_of_the_other_pages_runs_as_printed():
    torch.manual_seed(0)
    model, images, labels = Tiny().model, torch.randn(4, 1, 8, 8), torch.arange(4) % 3
    names = {"model": model, "images": images, "labels": labels, "criterion": nn.CrossEntropyLoss()}
    names |= {"optimizer": torch.optim.SGD(model.parameters(), 0.1), "graph": slimming.trace(model, images)}
    elsewhere = ROOT / "docs" / "deployment.md"  # in tests/stages/test_export_stage.py, on what an export leaves
    pages = [path for path in PAGES[1:] if path != elsewhere]
    blocks = [block for path in pages for language, block in _blocks(path) if language == "python"]
    for block in blocks:
        exec(compile(block, "docs", "exec"), names)
    gamma = model[1].weight
    penalty = names["SquaredPenalty"]({"bn": gamma}, 0.5)
    expected = torch.autograd.grad(0.25 * gamma.square().sum(), gamma)[0] + gamma.grad
    penalty.add_gradient()
    torch.testing.assert_close(gamma.grad, expected)
    assert names["plan"].got["candidates"] == 16
