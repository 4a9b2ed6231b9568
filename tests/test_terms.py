"""A loss term from outside: one file, registered; nothing else of the package knows it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from objectives import make_batch, make_objective, values_of
from training import FLOW_ONLY, fails_with, options, start_trainer, train_steps

from pixelgen.config import LossConfig, config_from_yaml, config_to_yaml, load_config
from pixelgen.losses.term import TERMS, register
from pixelgen.losses.terms.alignment import Alignment
from pixelgen.planning.flops import train_step_flops
from pixelgen.planning.plan import plan_report
from pixelgen.train import main

pytestmark = pytest.mark.usefixtures("no_curves")
TOY = (*FLOW_ONLY, "--loss.toy_weight", "0.5")


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The term, for one test."""
    monkeypatch.setattr("pixelgen.losses.term.TERMS", TERMS)
    before = dict(TERMS)
    from toy_term import Toy

    if "toy" not in TERMS:
        register(Toy)
    yield Toy
    TERMS.clear()
    TERMS.update(before)


def test_its_options_are_options_of_the_command(tmp_path, capsys):
    config, _ = load_config([*TOY, "--loss.toy_start_step", "3", "--name", "run"])
    assert (config.loss.toy_weight, config.loss.toy_start_step) == (0.5, 3)
    assert config_from_yaml(config_to_yaml(config)) == config
    with pytest.raises(SystemExit):
        load_config(["--help"])
    assert "weight of the difference of total variations" in " ".join(capsys.readouterr().out.split())
    assert "loss.toy_weight must be 0 or more" in fails_with(capsys, ["--loss.toy_weight=-1"])


def test_it_trains_is_logged_saved_and_goes_on(tmp_path):
    more = ["--loss.gate_t", "0", "--train.log_every", "1", "--train.checkpoint_every", "2"]
    straight = options(tmp_path, "straight", 4, *TOY, *more)
    assert main(straight) == 0
    assert main(options(tmp_path, "stopped", 2, *TOY, *more)) == 0
    assert main(["--resume", str(tmp_path / "stopped"), "--train.max_steps", "4"]) == 0
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("straight", "stopped")
    ]
    for first, second in zip(*lines, strict=True):
        assert first["toy"] == second["toy"] and first["loss"] == second["loss"]
        assert first["loss"] == pytest.approx(first["flow_matching"] + 0.5 * first["toy"], rel=1e-5)


def test_its_network_is_trained_and_it_begins_at_its_step(tmp_path):
    trainer = start_trainer(options(tmp_path, "run", 4, *TOY, "--loss.toy_start_step", "2"))
    network = trainer.objective.get_submodule("toy_scale")
    before = [p.detach().clone() for p in network.parameters()]
    assert ["toy" in terms for terms in train_steps(trainer, 3)] == [False, False, True]
    assert all(not torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))
    assert "toy_scale.weight" in trainer.objective.state_dict()


def test_it_sees_the_samples_above_the_gate():
    objective = make_objective(toy_weight=0.5)
    batch = make_batch((0.1, 0.3, 0.5, 0.98))
    terms, per_sample = values_of(objective, batch)
    assert (per_sample["toy"] != 0).tolist() == [False, True, True, True]
    torch.testing.assert_close(terms["toy"], per_sample["toy"].sum() / 3)


def test_planning_counts_it():
    config, _ = load_config([*TOY, "--name", "run"])
    without = replace(config, loss=replace(config.loss, toy_weight=0.0))
    assert train_step_flops(config).projector > train_step_flops(without).projector == 0
    assert "does not fit" not in plan_report(config, "8")


def test_two_terms_of_one_name_are_refused():
    class Other(Alignment):
        name = "toy"

    with pytest.raises(ValueError, match="loss term toy is registered already"):
        register(Other)
    assert "toy" in LossConfig.parts()
