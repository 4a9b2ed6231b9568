"""The examples of docs/architecture.md: a denoiser and a loss term, run as they stand there."""

import json
import re
from pathlib import Path

import pytest
from forked import Forked
from training import FLOW_ONLY, QUICK

DOCS = Path(__file__).parents[1] / "docs"
MAIN = "import mixer, edges; from pixelgen.train import main; raise SystemExit(main())"
OPTIONS = ["--model.family", "mixer", "--model.size", "mixer/2", "--loss.edges_weight", "0.5", *FLOW_ONLY]


@pytest.fixture
def examples(tmp_path, monkeypatch) -> Path:
    """A folder with the files of the page, in which commands run."""
    blocks = re.findall(
        r"```python\n# (\w+\.py)\n(.*?)```", (DOCS / "architecture.md").read_text(), re.DOTALL
    )
    assert [name for name, _ in blocks] == ["mixer.py", "edges.py"]
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(folder: Path, *argv: str) -> str:
    with (folder / "errors").open("w") as errors:
        process = Forked(["-c", f"import sys; sys.path.insert(0, '.'); {MAIN}", *argv], stderr=errors)
    printed = "".join(process.lines(120))
    assert process.wait(60) == 0, (folder / "errors").read_text()
    return printed


def test_the_examples_train_resume_and_are_planned(examples):
    steps = ["--train.log_every", "1", "--train.max_steps"]
    run(examples, *OPTIONS, *QUICK, "--name", "run", *steps, "3")
    run(examples, "--resume", "runs/run", *steps, "5")
    lines = [json.loads(line) for line in (examples / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert any(line["edges"] > 0 for line in lines)
    plan = run(examples, *OPTIONS, "--plan", "1")
    assert plan.startswith("mixer/2 at 8x8 on 1xH100")


def test_links_of_the_page_lead_somewhere():
    text = (DOCS / "architecture.md").read_text()
    for file, anchor in re.findall(r"\]\((\w+\.md)(?:#([\w-]+))?\)", text):
        headings = re.findall(r"^#+ (.+)$", (DOCS / file).read_text(), re.MULTILINE)
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], (
            file,
            anchor,
        )
