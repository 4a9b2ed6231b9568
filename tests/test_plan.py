"""--plan: its memory model against what PyTorch keeps, its counts against modules, its text and errors."""

import gc
import re
from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
import torchvision
from forked import Forked
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from pixelgen.config import load_config
from pixelgen.encoders.dinov2 import MODELS
from pixelgen.encoders.embedded import EmbeddedConfig, EmbeddedFeatures
from pixelgen.errors import UserError
from pixelgen.losses.build import build_networks
from pixelgen.losses.gate import NoiseGate, select_samples
from pixelgen.losses.objective import Objective
from pixelgen.losses.times import Times
from pixelgen.models.families import build_denoiser
from pixelgen.models.jit import JiT
from pixelgen.models.sizes import SIZES
from pixelgen.planning.counting import LiveStorages, activation_bytes, objective_bytes
from pixelgen.planning.devices import parse_machine
from pixelgen.planning.memory import count_parameters, images_past_gate, resolve_layout, step_memory
from pixelgen.planning.plan import checkpoints_kept, communication, plan_report

# pixelgen-xl-256 is the command's; of PixelDiT's large ones, the one with most terms
RECIPES = ("pixelgen-l-256", "jit-l-256", "jit-b-256", "pixelgen-dit-xl-256")
IN_CONTEXT = replace(
    SIZES["tiny/4"], width=128, depth=4, bottleneck_dim=32, in_context_len=8, in_context_start=2
)
DTYPES = {False: torch.float32, True: torch.bfloat16}
MODELS_TO_MEASURE = {
    "tokens in context": IN_CONTEXT,
    "dropout": replace(IN_CONTEXT, width=96, bottleneck_dim=0, in_context_len=0, proj_dropout=0.1),
}


@cache
def recipe(name):
    return load_config(["--config", name, "--name", "test"])[0]


def config(name="digits", **changes):
    """A recipe with some sections changed: ``config("jit-b-256", train={"batch_size": 8})``."""
    run = recipe(name)
    sections = {key: replace(getattr(run, key), **values) for key, values in changes.items()}
    return replace(run, **sections)


def layout_of(run, gpus):
    parameters = count_parameters(run)
    return resolve_layout(run, parse_machine(gpus), parameters), parameters


def kept_by_denoiser(model, batch, is_half, checkpointing):
    """Bytes alive after a forward pass, parameters and inputs left out."""
    denoiser = JiT(model)
    denoiser.checkpoint_blocks(checkpointing)
    dtype = DTYPES[is_half]
    tokens = torch.randn(batch, model.num_tokens, model.patch_dim, dtype=dtype)
    t, y = torch.rand(batch), torch.zeros(batch, dtype=torch.int64)
    known = [*denoiser.parameters(), *denoiser.buffers(), tokens, t, y]
    gc.freeze()  # what was there before need not be looked through
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half), LiveStorages(known) as storages:
        output = denoiser.forward_tokens(tokens, model.grid, t, {"label": y}, 1)
    gc.collect()
    gc.unfreeze()
    total = sum(storages.alive.values())
    del output
    return total


@pytest.mark.parametrize("model", MODELS_TO_MEASURE.values(), ids=MODELS_TO_MEASURE)
@pytest.mark.parametrize("is_half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_activations_are_what_a_forward_pass_leaves_behind(model, is_half, checkpointing):
    small, large = (kept_by_denoiser(model, batch, is_half, checkpointing) for batch in (2, 6))
    per_image = (large - small) / 4  # what does not grow with the batch are weights
    estimate = activation_bytes(model, DTYPES[is_half], checkpointing)
    assert estimate == pytest.approx(per_image, rel=0.03)


@pytest.mark.parametrize("is_half", [False, True], ids=["fp32", "bf16"])
def test_what_is_alive_is_what_autograd_saved(is_half):
    model, dtype = IN_CONTEXT, DTYPES[is_half]
    denoiser = JiT(model)
    tokens = torch.randn(8, model.num_tokens, model.patch_dim)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        saved, _ = saved_bytes(
            denoiser,
            lambda: denoiser.forward_tokens(
                tokens, model.grid, torch.rand(8), {"label": torch.zeros(8, dtype=torch.int64)}
            ),
        )
    # with the weights: the packed AdaLN, and where autocast casts, copies of all but AdaLN and labels
    adaln = sum(p.numel() for name, p in denoiser.named_parameters() if "adaLN" in name)
    rest = sum(parameter.numel() for parameter in denoiser.parameters()) - adaln
    weights = adaln * dtype.itemsize + (rest * 2 if is_half else 0)
    assert 8 * activation_bytes(model, dtype) + weights == pytest.approx(saved, rel=0.05)


def saved_bytes(module, forward):
    """Bytes of all storages that autograd saves, but for the module's own, and of what is returned."""
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage  # kept, or its address would be given to another
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    returned = sum(tensor.nbytes for tensor in tree_leaves(output) if tensor is not None)
    return sum(storage.nbytes() for storage in saved.values()), returned


def objective_of(run):
    """The objective of a run with random weights, in memory."""
    model = build_denoiser(run.model_config())
    networks = build_networks(run.loss, model.config, EmbeddedFeatures)
    lpips, encoder = networks
    objective = Objective(
        run.loss,
        feature_width=model.config.width,
        patch_size=model.config.patch_size,
        encoder=encoder,
        lpips=lpips,
    )
    return objective, model.config


def kept_by_objective(objective, model, t, is_half):
    """Bytes alive after a forward pass for images at some times, parameters and inputs left out."""
    dtype = DTYPES[is_half]
    shape = (len(t), model.num_tokens, model.patch_dim)
    x_pred, clean = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=dtype)
    images = torch.zeros(len(t), model.channels, *model.image_height_width, dtype=torch.uint8)
    features = torch.randn(len(t), model.num_tokens, model.width, dtype=dtype, requires_grad=True)
    modules = (objective, objective.networks.encoder, objective.networks.lpips)
    held = [value for m in modules for value in (*m.parameters(), *m.buffers())]
    known = [*held, x_pred, clean, images, features]
    gc.freeze()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half), LiveStorages(known) as storages:
        outcome = objective(x_pred, clean, images, Times.of(torch.tensor(t)), features)
    gc.collect()
    gc.unfreeze()
    total = sum(storages.alive.values())
    del outcome
    return total


@pytest.mark.filterwarnings("ignore:.*random weights")
@pytest.mark.parametrize("is_half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("networks", ["embedded", "vgg16 and dinov2"])
def test_activations_of_the_objective_are_what_a_forward_pass_leaves_behind(networks, is_half):
    run = config("digits", loss={"adversarial_weight": 0.1})
    if networks != "embedded":
        loss = {"tokens": "dinov2_vits14", "p_dino_layer": 3, "stages_weights": "random"}
        loss["tokens_weights"] = "random"
        run = config("pixelgen-l-256", data={"image_size": 32}, loss=loss)
    objective, model = objective_of(run)
    objective.networks.speed_up(half=is_half, compiled=False)
    kept = {t: kept_by_objective(objective, model, t, is_half) for t in ((1.0,), (1.0,) * 3, (1.0, 0.0, 0.0))}
    one = kept[1.0,]
    rejected, more = objective_bytes(run.loss, run.model_config(), DTYPES[is_half])
    within = 0.12 if networks == "embedded" else 0.05  # with the discriminator a little is counted twice
    assert rejected + more == pytest.approx((kept[(1.0,) * 3] - one) / 2, rel=within)
    assert rejected == pytest.approx((kept[1.0, 0.0, 0.0] - one) / 2, rel=within)
    assert rejected > 0 and more > 0


def test_what_the_perceptual_networks_keep_has_its_row_without_a_gate_too():
    gated, ungated = config("digits"), config("digits", loss={"gate_t": 0.0})
    model = gated.model_config()
    some, all_ = (objective_bytes(run.loss, model, torch.float32) for run in (gated, ungated))
    assert all_[0] == some[0] > 0
    assert all_[1] == pytest.approx(some[1], rel=0.05)  # without the copies of a selection
    layout, parameters = layout_of(ungated, "1")
    images = ungated.train.batch_size
    row = step_memory(ungated, parameters, layout)[f"perceptual activations, {images} images"]
    assert row == images * all_[1]


def test_parameters_of_frozen_networks():
    parameters = count_parameters(config("pixelgen-l-256"))
    with torch.device("meta"):
        vgg = torchvision.models.vgg16(weights=None).features
        vit = timm.create_model(MODELS["dinov2_vitb14"], num_classes=0)
    for module, count in ((vgg, parameters.stages), (vit, parameters.tokens)):
        assert count == sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_a_real_model():
    run = config()  # digits
    denoiser = JiT(run.model_config())
    parameters = count_parameters(run)
    assert parameters.denoiser == sum(parameter.numel() for parameter in denoiser.parameters())
    adaln = sum(p.numel() for name, p in denoiser.named_parameters() if "adaLN" in name)
    block = sum(parameter.numel() for parameter in denoiser.blocks[0].parameters())
    assert parameters.adaln == adaln
    assert set(parameters.blocks) == {block}
    features = EmbeddedFeatures(EmbeddedConfig(channels=1, patch_size=2, num_classes=10))
    assert parameters.stages == sum(parameter.numel() for parameter in features.parameters())
    assert "embedded, frozen" not in plan_report(run, "1")  # not worth a line


def test_a_selection_is_as_large_as_the_gate_makes_it():
    run, gate = config("pixelgen-l-256"), NoiseGate("hard", 0.3)
    generator, most = torch.Generator().manual_seed(0), images_past_gate(run, 32)
    normal = torch.randn(500, 32, generator=generator)
    sizes = [len(select_samples(Times.of(torch.sigmoid(draw * 0.8 - 0.8)), gate)) for draw in normal]
    assert most % 4 == 0 and sum(size > most for size in sizes) <= 5
    assert most - 4 <= max(sizes)  # and not more than a bucket too large
    assert images_past_gate(config("pixelgen-l-256", loss={"gate_t": 0.0}), 32) == 32


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_fit(name):
    text = plan_report(config(name), "8 x a100")
    assert "does not fit" not in text
    millions = {"jit-b-256": "131.1", "pixelgen-dit-xl-256": "797.4"}.get(name, "458.9")
    assert re.search(rf"^  denoiser +{millions} M$", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["pixeldit-b-256", "pixeldit-l-256", "pixeldit-xl-256", "pixeldit-xl-256-paper", "pixeldit-xl-512"],
)
def test_the_other_recipes_of_pixeldit_fit(name):
    text = plan_report(config(name), "8xH100")
    assert "does not fit" not in text
    millions = {"pixeldit-b-256": "184.7", "pixeldit-l-256": "569.6"}.get(name, "797.4")
    assert re.search(rf"^  denoiser +{millions} M$", text, re.MULTILINE)


def test_the_command_needs_no_data_and_no_gpu(tmp_path):
    with (tmp_path / "errors").open("w") as errors:
        process = Forked(["-m", "pixelgen.train", "--config", "pixelgen-xl-256", "--plan"], stderr=errors)
    text = "".join(process.lines(120))
    assert process.wait(60) == 0 and not (tmp_path / "errors").read_text()
    assert text.startswith("PixelGen-XL/16 at 256x256 on 8xH100, bfloat16\n")
    assert "does not fit" not in text and re.search(r"^  denoiser +676.7 M$", text, re.MULTILINE)
    items = [
        "weights",
        "gathered weights, a block's gradient",
        "gradients",
        "AdamW",
        "EMA x 1",
        "frozen networks",
        "activations, 32 images",
        "perceptual activations, 28 images",
        "CUDA and workspaces (allowance)",
    ]
    memory = text[text.index("memory") : text.index("checkpoints")]
    rows = dict(re.findall(r"^  (\S.*?)  +([\d,.]+)", memory, re.MULTILINE))
    assert sum(float(rows[item]) for item in items) == pytest.approx(float(rows["total"]), abs=0.1)
    assert max(len(line) for line in text.splitlines()) <= 120


def test_the_default_of_plan_and_its_place_among_other_options(capsys):
    for argv in (["--plan", "--train.max_steps", "10"], ["--train.max_steps", "10", "--plan", "8xH100"]):
        with pytest.raises(SystemExit) as stop:
            load_config(argv, plan=plan_report)
        assert stop.value.code == 0
    first, second = capsys.readouterr().out.split("tiny/2")[1:]
    assert first == second and "time to step 10," in first
    with pytest.raises(UserError, match="unknown option --plan"):  # of programs that do not plan
        load_config(["--plan"])


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ("0", "--plan must be N or NxDEVICE, such as 4 or 16xH100, got '0'"),
        ("H100", "--plan must be N or NxDEVICE"),
        ("8xH10", "--plan: unknown device H10; did you mean H100? Known are B200, "),
        ("12", "--plan: above 8, GPUs must come in full nodes of 8, got 12"),
        ("7", "train.batch_size must be a multiple of 7 (7 processes x 1 micro-batches), such as 252 or 259"),
    ],
)
def test_gpus_that_cannot_be(gpus, message):
    with pytest.raises(UserError, match=re.escape(message)):
        plan_report(config("pixelgen-l-256"), gpus)


def test_batches_and_shards_that_cannot_be_divided():
    with pytest.raises(UserError, match=r"of 24 \(8 processes x 3 micro-batches\), such as 24"):
        plan_report(config(train={"batch_size": 12, "micro_batches": 3}), "8")
    with pytest.raises(UserError, match=r"parallel\.shard_size must divide the 4 GPUs, got 3"):
        plan_report(config(parallel={"mode": "hsdp", "shard_size": 3}), "4")


@pytest.mark.parametrize(
    ("name", "gpus", "mode", "shards"),
    [
        ("jit-b-256", "8", "ddp", 1),
        ("jit-l-256", "8", "fsdp", 8),
        ("jit-l-256", "16", "hsdp", 8),
        ("jit-l-256", "1", "none", 1),
    ],
)
def test_auto_chooses_the_layout(name, gpus, mode, shards):
    layout, _ = layout_of(config(name), gpus)
    assert (layout.mode, layout.shards, layout.copies) == (mode, shards, int(gpus) // shards)


@pytest.mark.parametrize(
    ("name", "changes", "gpus", "expected"),
    [
        ("jit-b-256", {}, "1xA100", "--train.micro_batches 2"),
        # the weights with their gradients and five averages do not fit into one of these
        (
            "pixelgen-xl-256",
            {"parallel": {"mode": "ddp"}, "ema": {"decay": (0.9, 0.99, 0.999, 0.9999)}},
            "8xL4",
            "--parallel.mode fsdp",
        ),
        ("jit-l-256", {}, "8xL4", "--train.micro_batches 2"),
    ],
)
def test_what_does_not_fit_comes_with_a_remedy_that_does(name, changes, gpus, expected):
    change = re.search(r"does not fit: try (.*)", plan_report(config(name, **changes), gpus))[1]
    assert change == expected
    option, value = change.split()
    section, key = option.removeprefix("--").split(".")
    changes = changes | {section: changes.get(section, {}) | {key: value if key == "mode" else int(value)}}
    assert "does not fit" not in plan_report(config(name, **changes), gpus)


def test_checkpointing_is_the_remedy_where_passes_would_become_small():
    averages = {"decay": tuple(1 - 0.1**digits for digits in range(1, 7))}  # 12 of 22 GiB
    run = config("jit-l-256", train={"batch_size": 8}, ema=averages)
    assert "does not fit: try --train.activation_checkpointing selective\n" in plan_report(run, "1xL4")
    # with four times the tokens half of a pass is still a lot
    averages = {"decay": averages["decay"][:5]}
    larger = config("jit-l-256", data={"image_size": 512}, train={"batch_size": 4}, ema=averages)
    assert "does not fit: try --train.micro_batches 2\n" in plan_report(larger, "1xL4")


def test_without_a_remedy_it_says_so():
    run = config("jit-l-256", model={"size": "JiT-G/16"}, train={"batch_size": 1})
    assert "does not fit: try more GPUs, larger ones, or a smaller model" in plan_report(run, "1xL4")


def test_more_averages_and_fewer_shards_cost_what_they_hold():
    run = config("jit-l-256", train={"batch_size": 8 * 16})
    parameters = count_parameters(run)

    def changed(**sections):
        return config("jit-l-256", **{"train": {"batch_size": 8 * 16}} | sections)

    def item(run, name, shards=8):
        layout = replace(resolve_layout(run, parse_machine("8"), parameters), shards=shards)
        return step_memory(run, parameters, layout)[name]

    more = changed(ema={"decay": (0.99, 0.999), "power": (0.1,)})
    assert item(more, "EMA x 3") == 3 * item(run, "EMA x 1") == 3 * 4 * parameters.denoiser / 8
    assert item(run, "AdamW", shards=1) == 8 * parameters.trained
    gathered = "gathered weights, a block's gradient"
    kept = changed(parallel={"reshard_after_forward": False})
    assert item(kept, gathered) - item(run, gathered) == 2 * 22 * parameters.blocks[0]  # all 24 instead of 2
    model = run.model_config()
    full = changed(train={"batch_size": 8 * 16, "activation_checkpointing": "full"})
    kept, everything = (activation_bytes(model, torch.bfloat16, kind) for kind in ("full", "none"))
    of_objective, _ = objective_bytes(full.loss, model, torch.bfloat16)
    kept += of_objective + (everything - kept) / model.depth
    assert item(full, "activations, 16 images") == 16 * kept


def test_communication_follows_the_formula():
    run = config("jit-l-256", train={"micro_batches": 2})
    layout, parameters = layout_of(run, "8")
    P, blocks = parameters.trained, sum(parameters.blocks)
    sharded = 2 * (2 * (P + blocks) + 4 * P) * 7 / 8
    assert communication(run, parameters, layout)[0] == pytest.approx(sharded)
    layout, _ = layout_of(run, "16")
    # over copies once a step, however many micro-batches there are
    assert communication(run, parameters, layout)[0] == pytest.approx(sharded + 2 * 4 * P / 8 / 2)
    kept = config("jit-l-256", parallel={"reshard_after_forward": False})
    layout, _ = layout_of(kept, "8")
    assert communication(kept, parameters, layout)[0] == pytest.approx((2 + 4) * P * 7 / 8)
    run = config("jit-b-256")
    layout, parameters = layout_of(run, "4")
    assert communication(run, parameters, layout)[0] == pytest.approx(2 * 4 * parameters.trained * 3 / 4)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, 4),  # three, and the one being written
        ({"keep_checkpoints": 0}, 20),
        ({"keep_every": 50_000}, 8),
        ({"max_steps": 15_000}, 2),
        ({"checkpoint_every": 0}, 1),
    ],
)
def test_checkpoints_on_disk(changes, kept):
    assert checkpoints_kept(config("pixelgen-l-256", train=changes)) == kept


def test_time_follows_the_schedule_of_the_terms():
    def hours(**loss):
        text = plan_report(config("pixelgen-l-256", loss=loss), "8xH800")
        return float(re.search(r"MFU 20% +([\d.]+) h", text)[1])

    always, never = hours(), hours(alignment_weight=0.0)
    half = hours(alignment_schedule=((100_000, 0.0),))
    assert always > half > never and half == pytest.approx((always + never) / 2, abs=0.1)
