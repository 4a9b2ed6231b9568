"""Markdown tables and the summary of a run, from rows of a CSV."""

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


def ratios(rows: list[Row]) -> str:
    """How many times faster ours is than eager and compile: a line per op, mode and dtype."""
    told: dict[tuple[str, str, str], list[str]] = {}
    for (op, mode, dtype, shape), group in grouped(rows, ("op", "mode", "dtype", "shape")).items():
        gains = [(name, ratio(group, name)) for name in ("eager", "compile")]
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
