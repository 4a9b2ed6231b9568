"""The suite of the perceptual branch: gathered and masked agree before they are timed, and what it writes."""

import csv
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pixelgen_kernels.ops import lpips_distance
from pixelgen_kernels.ops.cosine_distance import cosine_distance, cosine_distance_ref

sys.path.append(str(Path(__file__).parent.parent))  # the benchmarks are not installed
from benchmarks import perceptual, report, tables
from benchmarks.__main__ import main
from benchmarks.case import Case, cases, normal
from benchmarks.measure import ColdTimer
from pixelgen.encoders.base import StageEncoder, TokenEncoder
from pixelgen.losses.gate import Selection

CPU = torch.device("cpu")
OPTIONS = ["--suite", "perceptual", "--device", "cpu", "--repeats", "3"]


class SmallStages(StageEncoder):
    """In the place of VGG16: large enough that a sample more or less shows in memory."""

    stage_widths = (8,)

    def __init__(self, weights: str) -> None:
        super().__init__()
        assert weights == "random"
        self.convolution = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.register_layer_weights([torch.ones(8)])
        self.freeze()

    def forward(self, x):
        return [self.convolution(x)]


class SmallTokens(TokenEncoder):
    """In the place of DINOv2."""

    width = 6

    def __init__(self, name: str, weights: str, *, patch_size: int) -> None:
        super().__init__()
        assert weights == "random"
        self.convolution = torch.nn.Conv2d(3, self.width, patch_size, stride=patch_size)
        self.freeze()

    def forward(self, x):
        return self.convolution(x).flatten(2).transpose(1, 2)


def small_op(device: torch.device):
    yield Case(
        op="cosine_distance",
        shape="B/16 B=2 T=3 D=16",
        dtype="fp32",
        fused=cosine_distance,
        eager=cosine_distance_ref,
        inputs=lambda device: {
            "pred": normal(2, 3, 16, dtype="fp32", device=device),
            "target": normal(2, 3, 16, dtype="fp32", device=device, seed=1),
        },
        differentiable=("pred",),
    )


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(perceptual, "VGG16", SmallStages)
    monkeypatch.setattr(perceptual, "DINOv2", SmallTokens)
    monkeypatch.setattr(perceptual, "cases", lambda device, of_models: list(small_op(device)))
    monkeypatch.setitem(perceptual.SIZES, "cpu", replace(perceptual.SIZES["cpu"], side=32))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_writes_rows_table_and_plot(tmp_path, capsys):
    assert main([*OPTIONS, "--providers", "ours", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "perceptual.csv")
    assert tuple(rows[0]) == report.KERNELS.columns
    of_branch = [row for row in rows if row["op"] == "branch"]
    terms = [row["shape"].split()[0] for row in of_branch if row["provider"] == "ours"]
    assert terms == ["all", "lpips", "p_dino", "alignment"]
    assert {(row["provider"], row["mode"]) for row in of_branch} == {
        ("masked", "fwd_bwd"),
        ("ours", "fwd_bwd"),
    }
    for row in of_branch:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]), row
        assert row["shape"].endswith("B=8 H=W=32 seen=13/24"), row
        assert row["dtype"] == "fp32" and row["device"] and row["commit"]
    peaks = {(row["shape"].split()[0], row["provider"]): float(row["peak_mb"]) for row in of_branch}
    assert peaks["lpips", "ours"] < peaks["lpips", "masked"]
    assert {(row["op"], row["provider"], row["mode"]) for row in rows if row["op"] != "branch"} == {
        ("cosine_distance", provider, mode)
        for provider in ("eager", "ours")
        for mode in ("fwd", "bwd", "fwd_bwd")
    }
    table = (tmp_path / "perceptual.md").read_text()
    assert "| lpips | B=8 H=W=32 seen=13/24 | fp32 |" in table and "| cosine_distance | B/16" in table
    assert (tmp_path / "perceptual.png").stat().st_size > 10_000
    assert "branch fwd_bwd fp32: ours all " in capsys.readouterr().out


def test_only_the_branch(tmp_path):
    assert main([*OPTIONS, "--only", "branch", "--batch", "1", "--out", str(tmp_path)]) == 0
    assert {row["op"] for row in read(tmp_path / "perceptual.csv")} == {"branch"}


@pytest.mark.parametrize(
    ("providers", "timed"),
    [
        ("masked", {("branch", "masked")}),
        ("eager", {("cosine_distance", "eager")}),
        (
            "masked,ours",
            {
                ("branch", "masked"),
                ("branch", "ours"),
                ("cosine_distance", "eager"),
                ("cosine_distance", "ours"),
            },
        ),
    ],
)
def test_only_providers_that_are_asked_for_and_what_they_are_held_against(tmp_path, providers, timed):
    options = ["--providers", providers, "--batch", "1", "--out", str(tmp_path)]
    assert main([*OPTIONS, *options]) == 0
    rows = read(tmp_path / "perceptual.csv")
    assert {(row["op"], row["provider"]) for row in rows} == timed
    assert (tmp_path / "perceptual.md").stat().st_size and (tmp_path / "perceptual.png").stat().st_size


def test_without_ours_nothing_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual.Branch, "problems", lambda self: pytest.fail("ours was run"))
    assert main([*OPTIONS, "--providers", "masked", "--batch", "1", "--out", str(tmp_path)]) == 0


def test_a_gathering_that_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    def one_too_few(t, gate, *, device):
        rows = gate.passes(t).nonzero()[1:, 0]
        return Selection(len(rows), rows, torch.ones(len(rows), dtype=torch.bool))

    monkeypatch.setattr("pixelgen.losses.objective.select_samples", one_too_few)
    assert main([*OPTIONS, "--only", "branch", "--out", str(tmp_path)]) == 1
    rows = read(tmp_path / "perceptual.csv")
    ours = {row["shape"].split()[0] for row in rows if row["provider"] == "ours"}
    assert ours == {"alignment"}  # which sees every sample
    told = capsys.readouterr()
    assert "branch lpips: ours is wrong and not timed: the loss is" in told.out + told.err


def test_gradients_are_compared_too():
    _, branch = next(perceptual.branches(perceptual.SIZES["cpu"], CPU))
    assert branch.problems() == []
    call = branch.call

    def scaled(provider, index):
        value, *grads = call(provider, index)
        return value, *(grad * 1.01 if provider == "ours" else grad for grad in grads)

    branch.call = scaled
    assert [problem.split(" is ")[0] for problem in branch.problems()] == ["grad_x_pred", "grad_features"]


def test_masking_sees_every_sample_and_gathering_only_those_above_the_gate():
    _, branch = next(perceptual.branches(perceptual.SIZES["cpu"], CPU))
    seen = []
    stages = branch.objective.lpips.stages
    stages.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    for index in range(branch.size.batches):
        branch.call("masked", index)
        branch.call("ours", index)
    assert seen == [n for count in branch.seen for n in (8, 8, count, count)]  # clean and predicted


def test_times_are_those_of_training():
    times = perceptual.draw_times(125, 8)
    assert times.shape == (125, 8)
    assert (times >= 0.3).float().mean().item() == pytest.approx(0.5236, abs=1e-3)
    logits = torch.logit(times)
    assert logits.mean().item() == pytest.approx(-0.8, abs=0.01)
    assert logits.std().item() == pytest.approx(0.8, abs=0.01)
    counts = (times >= 0.3).sum(1).float()
    assert 1.0 < counts.std() < 1.9  # of a batch: binomial, deviation 1.41


def test_every_repeat_times_the_same_batches():
    _, branch = next(perceptual.branches(perceptual.SIZES["cpu"], CPU))
    calls = []
    branch.call = lambda provider, index: calls.append((provider, index)) or (torch.zeros(()),)
    branch.measure(["masked", "ours"], ColdTimer(CPU), 3, SimpleNamespace(update=lambda: None))
    timed = [(name, index) for index in range(3) for _ in range(3) for name in ("masked", "ours")]
    assert calls[: len(timed)] == timed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "swiglu"], "--only must be one of branch, lpips_distance, cosine_distance, got swiglu"),
        (["--shapes", "L/16"], "--shapes has no meaning with --suite perceptual"),
        (["--providers", "theirs"], "--providers must be one of masked, eager, compile, ours, got theirs"),
        (
            ["--only", "branch", "--providers", "eager,compile"],
            "nothing is left to time: branch has masked, ours and not eager, compile",
        ),
        (
            ["--only", "cosine_distance", "--providers", "masked"],
            "nothing is left to time: cosine_distance has eager, compile, ours and not masked",
        ),
    ],
)
def test_unknown_names_are_refused(tmp_path, capsys, options, said):
    try:
        code = main([*OPTIONS, *options, "--out", str(tmp_path / "results")])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def stage_rows(times: dict[str, list[float]], mode: str = "fwd_bwd") -> list[report.Row]:
    """Rows of lpips_distance: provider -> milliseconds of the stages, in order."""
    return [
        {
            "op": "lpips_distance",
            "provider": provider,
            "mode": mode,
            "dtype": "fp32",
            "shape": f"VGG16-{stage} B=8 C=64",
            "median_ms": str(time),
            "gbps": "1",
            "share_of_copy": "0.5",
            "peak_mb": "1",
            **dict.fromkeys(report.SETTING, "x"),
        }
        for provider, of_stages in times.items()
        for stage, time in zip(lpips_distance.STAGES, of_stages, strict=False)
    ]


def test_all_stages_together():
    times = {"eager": [50.0, 20, 8, 1, 1], "compile": [16.0, 8, 4, 1, 1], "ours": [8.0, 4, 2, 1, 1]}
    rows = stage_rows(times) + stage_rows({name: [1.0] * 5 for name in times}, mode="fwd")
    line = "lpips_distance fwd_bwd fp32: all five stages of B=8: eager 80 ms, compile 30 ms, ours 16 ms; "
    line += "ours 5.00x eager, 1.88x compile"
    assert tables.all_stages(rows) == [line]
    assert f"\n{line}\n" in tables.perceptual(rows)


def test_stages_are_summed_only_where_all_were_timed():
    times = {"eager": [5.0] * 5, "compile": [3.0] * 4, "ours": [2.0] * 5}
    (line,) = tables.all_stages(stage_rows(times))
    assert line.endswith("all five stages of B=8: eager 25 ms, ours 10 ms; ours 2.50x eager")
    assert tables.all_stages(stage_rows({**times, "ours": [2.0] * 4})) == []
    assert tables.all_stages(stage_rows({"ours": [2.0] * 5})) == []


def test_a_run_of_lpips_tells_of_all_stages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(perceptual, "cases", cases)
    monkeypatch.setitem(lpips_distance.IMAGE_SIZE, "cpu", 16)
    options = ["--only", "lpips_distance", "--providers", "ours", "--out", str(tmp_path)]
    assert main([*OPTIONS, *options]) == 0
    (line,) = tables.all_stages(read(tmp_path / "perceptual.csv"))
    assert "lpips_distance fwd_bwd fp32: all five stages of B=8: eager " in line
    assert line in capsys.readouterr().out.splitlines()
    assert line in (tmp_path / "perceptual.md").read_text().splitlines()
