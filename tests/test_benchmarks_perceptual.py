"""The suite of the perceptual branch: gathered and masked agree before they are timed, and what it writes."""

from dataclasses import replace

import pytest
import torch
from benchmarking import assert_are_plots, bench, named
from pixelgen_kernels.ops.cosine_distance import cosine_distance, cosine_distance_ref

from benchmarks.case import Case, normal
from benchmarks.measure import ColdTimer
from benchmarks.suites import perceptual
from pixelgen.encoders.base import StageEncoder, TokenEncoder
from pixelgen.losses.gate import Selection

CPU = torch.device("cpu")


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


@pytest.fixture(autouse=True)
def _no_kept_networks():
    yield
    perceptual._networks.cache_clear()


def branch_of_all() -> perceptual.Branch:
    return perceptual.branch_of(perceptual.SIZES["cpu"], CPU, perceptual.TERMS["all"])


def test_a_run_writes_rows_table_and_plot(tmp_path, capsys):
    code, rows = bench("perceptual", tmp_path, "--providers", "ours")
    assert code == 0
    of_branch = [row for row in rows if row["case"] == "branch"]
    terms = [row["shape"].split()[0] for row in of_branch if row["provider"] == "ours"]
    assert terms == ["all", "lpips", "p_dino", "alignment"]
    assert named(of_branch, "provider", "mode") == {("masked", "fwd_bwd"), ("ours", "fwd_bwd")}
    for row in of_branch:
        assert row["shape"].endswith("B=8 H=W=32 seen=13/24") and row["dtype"] == "fp32"
    peaks = {(row["shape"].split()[0], row["provider"]): float(row["peak_mb"]) for row in of_branch}
    assert peaks["lpips", "ours"] < peaks["lpips", "masked"]
    assert named([row for row in rows if row["case"] != "branch"], "case", "provider", "mode") == {
        ("cosine_distance", provider, mode)
        for provider in ("eager", "ours")
        for mode in ("fwd", "bwd", "fwd_bwd")
    }
    table = (tmp_path / "perceptual.md").read_text()
    assert "| branch | lpips B=8 H=W=32 seen=13/24 | fp32 |" in table and "| cosine_distance | B/16" in table
    assert_are_plots(tmp_path, "perceptual.png")
    assert "branch fwd_bwd fp32: ours all " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "timed"),
    [
        ("--only branch --providers ours", {("branch", "masked"), ("branch", "ours")}),
        ("--providers masked", {("branch", "masked")}),
        ("--providers eager", {("cosine_distance", "eager")}),
    ],
)
def test_only_what_is_asked_for_and_what_it_is_held_against(tmp_path, options, timed):
    code, rows = bench("perceptual", tmp_path, "--batch", "1", *options.split())
    assert code == 0
    assert named(rows, "case", "provider") == timed


def test_without_ours_nothing_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual.Branch, "problems", lambda self: pytest.fail("ours was run"))
    assert bench("perceptual", tmp_path, "--providers", "masked", "--batch", "1")[0] == 0


def test_a_gathering_that_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    def one_too_few(times, gate):
        rows = gate.passes(times.host).nonzero()[1:, 0]
        return Selection(rows, torch.ones(len(rows), dtype=torch.bool))

    monkeypatch.setattr("pixelgen.losses.objective.select_samples", one_too_few)
    code, rows = bench("perceptual", tmp_path, "--only", "branch")
    assert code == 1
    ours = {row["shape"].split()[0] for row in rows if row["provider"] == "ours"}
    assert ours == {"alignment"}  # which sees every sample
    told = capsys.readouterr()
    assert "branch lpips: ours is wrong and not timed: the loss is" in told.out + told.err


def test_gradients_are_compared_too():
    branch = branch_of_all()
    assert branch.problems() == []
    call = branch.call

    def scaled(provider, index):
        value, *grads = call(provider, index)
        return value, *(grad * 1.01 if provider == "ours" else grad for grad in grads)

    branch.call = scaled
    assert [problem.split(" is ")[0] for problem in branch.problems()] == ["grad_x_pred", "grad_features"]


def test_masking_sees_every_sample_and_gathering_only_those_above_the_gate():
    branch = branch_of_all()
    seen = []
    stages = branch.objective.networks.lpips.stages
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
    branch = branch_of_all()
    calls = []
    branch.call = lambda provider, index: calls.append((provider, index)) or (torch.zeros(()),)
    branch.measure(["masked", "ours"], ColdTimer(CPU), 3)
    timed = [(name, index) for index in range(3) for _ in range(3) for name in ("masked", "ours")]
    assert calls[: len(timed)] == timed
