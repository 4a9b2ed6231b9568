"""Markdown tables and the summary of a run, from rows of a CSV."""

from pixelgen_kernels.ops.lpips_distance import STAGES

from benchmarks.report import Row, grouped, ratio


def heading(row: Row) -> str:
    """With what the rows were measured."""
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "cuda") if row[name])
    return f"{row['device']}, {row['threads']} CPU threads, commit {row['commit']}, {versions}."


def _table(head: list[str], num_texts: int, lines: list[list[str]]) -> str:
    rule = ["---"] * num_texts + ["---:"] * (len(head) - num_texts)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def kernels(rows: list[Row]) -> str:
    """One line per (op, shape, dtype, mode): times, bandwidth of ours, memory, ours against the others."""
    providers = ("eager", "compile", "ours")
    lines = []
    for key, group in grouped(rows, ("op", "shape", "dtype", "mode")).items():
        ours = group.get("ours", {})
        share = f"{float(ours['share_of_copy']):.0%}" if ours else ""
        lines.append(
            [
                *key,
                *(group[name]["median_ms"] if name in group else "" for name in providers),
                _times(ratio(group, "eager")),
                _times(ratio(group, "compile")),
                ours.get("gbps", ""),
                share,
                *(f"{float(group[name]['peak_mb']):.1f}" if name in group else "" for name in providers),
            ]
        )
    head = ["op", "shape", "dtype", "mode", *(f"{name} ms" for name in providers), "vs eager", "vs compile"]
    head += ["GB/s", "of copy", *(f"{name} MB" for name in providers)]
    told = "Medians, cold cache; GB/s of ours and its share of what a copy reached in this run; peak memory."
    return f"{heading(rows[0])} {told}\n\n{_table(head, 4, lines)}\n"


def branch(rows: list[Row]) -> str:
    """One line per term: time and memory of the perceptual branch, masked and gathered."""
    providers = ("masked", "ours")
    lines = []
    for (shape, dtype), group in grouped(rows, ("shape", "dtype")).items():
        term, _, sizes = shape.partition(" ")
        columns = [
            [f"{float(group[name][column]):.4g}" if name in group else "" for name in providers]
            for column in ("median_ms", "peak_mb")
        ]
        lines.append([term, sizes, dtype, *columns[0], _times(ratio(group, "masked")), *columns[1]])
    head = ["term", "shape", "dtype", "masked ms", "ours ms", "vs masked", "masked MB", "ours MB"]
    told = (
        "Forward and backward; mean over the drawn batches of each batch's median; `seen`: samples above the "
        "gate; memory at its peak in the batch with most of them."
    )
    return f"{heading(rows[0])} {told}\n\n{_table(head, 3, lines)}\n"


def perceptual(rows: list[Row]) -> str:
    """The table of the branch, then that of the ops and of all stages together; any may be absent."""
    of_branch = [row for row in rows if row["op"] == "branch"]
    of_ops = [row for row in rows if row["op"] != "branch"]
    parts = [table(some) for table, some in ((branch, of_branch), (kernels, of_ops)) if some]
    return "\n".join([*parts, *(f"{line}\n" for line in all_stages(rows))])


def all_stages(rows: list[Row]) -> list[str]:
    """A line per dtype: forward and backward of lpips_distance, summed over the stages that LPIPS compares.

    Of the providers that were timed at every stage; no line without ours and another.
    """
    sums: dict[tuple[str, str], dict[str, dict[str, float]]] = {}  # (dtype, batch) -> provider -> stage -> ms
    for row in rows:
        if (row["op"], row["mode"]) == ("lpips_distance", "fwd_bwd"):
            stage, batch = row["shape"].removeprefix("VGG16-").split()[:2]
            of_provider = sums.setdefault((row["dtype"], batch), {}).setdefault(row["provider"], {})
            of_provider[stage] = float(row["median_ms"])
    lines = []
    for (dtype, batch), stages in sums.items():
        names = [name for name in ("eager", "compile", "ours") if len(stages.get(name, ())) == len(STAGES)]
        if names[-1:] != ["ours"] or len(names) == 1:
            continue
        total = {name: sum(stages[name].values()) for name in names}
        times = ", ".join(f"{name} {total[name]:.4g} ms" for name in names)
        gains = ", ".join(f"{_times(total[name] / total['ours'])} {name}" for name in names[:-1])
        lines.append(f"lpips_distance fwd_bwd {dtype}: all five stages of {batch}: {times}; ours {gains}")
    return lines


def ratios(rows: list[Row]) -> str:
    """How many times faster ours is than the others: a line per op, mode and dtype."""
    told: dict[tuple[str, str, str], list[str]] = {}
    for (op, mode, dtype, shape), group in grouped(rows, ("op", "mode", "dtype", "shape")).items():
        gains = [(name, ratio(group, name)) for name in ("eager", "compile", "masked")]
        texts = [f"{_times(gain)} {name}" for name, gain in gains if gain is not None]
        if texts:
            told.setdefault((op, mode, dtype), []).append(f"{shape.split()[0]} {', '.join(texts)}")
    return "\n".join(f"{' '.join(key)}: ours {'; '.join(texts)}" for key, texts in told.items())


def step(rows: list[Row]) -> str:
    """One line per provider: time, throughput, use of the device, memory, the loss that all must share."""
    lines = []
    for (model, batch, dtype), group in grouped(rows, ("model", "batch", "dtype")).items():
        for provider, row in group.items():
            lines.append(
                [
                    model,
                    batch,
                    dtype,
                    provider,
                    f"{row['median_ms']} ({row['p20_ms']} to {row['p80_ms']})",
                    _times(ratio(group, "eager", provider)),
                    row["images_per_s"],
                    row["tflops"],
                    f"{float(row['mfu']):.1%}",
                    f"{float(row['peak_mb']):.0f}",
                    row["loss"],
                    row["grad_norm"],
                ]
            )
    head = ["model", "batch", "dtype", "provider", "ms/step (p20 to p80)", "vs eager", "img/s", "TFLOP/s"]
    head += ["MFU", "peak MB", "loss", "gradient norm"]
    told = (
        f"MFU against {rows[0]['peak_tflops']} TFLOP/s; loss and gradient norm are those of the first step."
    )
    return f"{heading(rows[0])} {told}\n\n{_table(head, 4, lines)}\n"


def data(rows: list[Row]) -> str:
    """A table of decoding, a line per size and provider, and one of the loader."""
    parts = []
    for op, baseline, told in (
        (
            "decode",
            "pil",
            "Decoding and cropping one image: milliseconds of one core, and images per second.",
        ),
        ("loader", "folder", "The loader: wall time per image."),
    ):
        lines = []
        for (shape,), group in grouped([row for row in rows if row["op"] == op], ("shape",)).items():
            for provider, row in group.items():
                times = f"{row['median_ms']} ({row['p20_ms']} to {row['p80_ms']})"
                gain = _times(ratio(group, baseline, provider))
                lines.append([shape, provider, times, row["images_per_s"], gain, row["levels"]])
        head = ["shape", "provider", "ms/img (p20 to p80)", "img/s", f"vs {baseline}", "grey levels off"]
        parts.append(f"{heading(rows[0])} {told}\n\n{_table(head, 2, lines)}\n")
    return "\n".join(parts)


def data_ratios(rows: list[Row]) -> str:
    """A line per shape: images per second of every provider, and how that compares with the baseline."""
    lines = []
    for (op, shape), group in grouped(rows, ("op", "shape")).items():
        gains = {name: ratio(group, "pil" if op == "decode" else "folder", name) for name in group}
        texts = (f"{name} {row['images_per_s']} img/s {_times(gains[name])}" for name, row in group.items())
        lines.append(f"{op} {shape}: {', '.join(text.rstrip() for text in texts)}")
    return "\n".join(lines)


def train(rows: list[Row]) -> str:
    """Tables of steps by source of images, of saves, and of numbers of processes; any may be absent."""
    parts = []
    for op, baseline, told, columns in (
        (
            "step",
            "synthetic",
            "A step of a whole run; `data wait`: its share that is spent waiting for images.",
            {"images_per_s": "img/s", "data_wait": "data wait", "loss": "loss"},
        ),
        (
            "save",
            "sync",
            "Time for which training waits at a checkpoint, and its share of what the checkpoint takes.",
            {"save_s": "save s", "stall_share": "stall"},
        ),
        ("beside", "alone", "A step while nothing, and while a checkpoint is written.", {}),
        (
            "processes",
            "one",
            "A step of one process and of several with the same batch and losses; MB that each sends.",
            {"images_per_s": "img/s", "sent_mb": "MB sent", "formula_mb": "MB by formula", "loss": "loss"},
        ),
    ):
        lines = []
        for (shape,), group in grouped([row for row in rows if row["op"] == op], ("shape",)).items():
            for provider, row in group.items():
                times = f"{row['median_ms']} ({row['p20_ms']} to {row['p80_ms']})"
                values = [
                    f"{float(row[column]):.1%}" if column in ("data_wait", "stall_share") else row[column]
                    for column in columns
                ]
                if op == "processes":
                    formula = float(row["formula_mb"])
                    values.append(f"{float(row['sent_mb']) / formula:.3f}" if formula else "")
                lines.append([shape, provider, times, _times(ratio(group, baseline, provider)), *values])
        if lines:
            head = ["shape", "provider", "ms (p20 to p80)", f"vs {baseline}", *columns.values()]
            head += ["sent / formula"] if op == "processes" else []
            parts.append(f"{heading(rows[0])} {told}\n\n{_table(head, 2, lines)}\n")
    return "\n".join(parts)
