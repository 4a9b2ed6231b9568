"""What GPUs can do by their data sheets, and how many of them a plan is for. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pixelgen.config.values import nearest
from pixelgen.errors import UserError

GIB = 2**30
GPUS_PER_NODE = 8

# Patterns of names, of which the first that matches counts. TFLOP/s of dense matrix products, from the
# vendor's data sheets: bf16 and fp16 with fp32 accumulation, then fp32 through TF32; sparsity is left out, it
# doubles what is advertised. Names that --plan takes, with the GiB that the driver leaves, rounded down.
_GPUS: tuple[tuple[str, float, float, dict[str, int]], ...] = (
    (r"GB[23]00", 2500, 1250, {}),
    (r"B[23]00", 2250, 1125, {"B200": 178}),
    (r"H200 NVL", 835.5, 417.5, {}),
    (r"H200|GH200", 989.5, 494.5, {"H200": 139}),
    (r"H[18]00 PCIe", 756, 378, {}),
    (r"H100 NVL", 835.5, 417.5, {}),
    (r"H[18]00", 989.5, 494.5, {"H100": 79, "H800": 79}),
    (r"H20", 148, 74, {"H20": 95}),
    (r"A[18]00", 312, 156, {"A100": 79, "A100-40GB": 39, "A800": 79}),
    (r"A40", 149.7, 74.8, {"A40": 44}),
    (r"A30", 165, 82, {}),
    (r"A10", 125, 62.5, {"A10": 22}),
    (r"L40S", 362, 183, {"L40S": 44}),
    (r"L40", 181, 90.5, {}),
    (r"L4", 121, 60, {"L4": 22}),
    (r"RTX A6000", 154.8, 77.4, {}),
    (r"RTX 6000 Ada Generation", 364.2, 182.1, {}),
    (r"RTX PRO 6000 Blackwell Workstation Edition", 503.8, 251.9, {}),
    (r"RTX ?5090", 209.5, 104.8, {"RTX5090": 31}),
    (r"RTX ?4090", 165.2, 82.6, {"RTX4090": 23}),
    (r"RTX ?3090", 71, 35.6, {"RTX3090": 23}),
)
MEMORY_GIB = {name: gib for *_, memory in _GPUS for name, gib in memory.items()}
# Parts of a name that make it another, slower device: a slice, a notebook's chip, a cut-down variant.
_OTHER_DEVICE = re.compile(r"\b(MIG|Laptop|Max-Q|D|Ti|SUPER)\b")


@dataclass(frozen=True)
class Machine:
    """So many GPUs of one kind, in nodes of eight."""

    gpus: int
    device: str

    @property
    def memory(self) -> int:
        """Bytes of one GPU."""
        return MEMORY_GIB[self.device] * GIB


def peak_flops(device_name: str, dtype: str) -> float | None:
    """FLOP/s of dense matrix products that the vendor states, MFU's denominator.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        dtype: "bf16", "fp16", or "fp32" for TF32.

    Returns:
        None for a device that is not in the table, a slice of one (MIG) included.
    """
    if _OTHER_DEVICE.search(device_name):
        return None
    for name, half, tf32, _ in _GPUS:
        if re.search(rf"\b(?:{name})\b", device_name):
            return (tf32 if dtype == "fp32" else half) * 1e12
    return None


def parse_machine(text: str) -> Machine:
    """``8xH100``, or ``8`` for as many H100.

    Raises:
        UserError: it is neither, the device is not known, or the nodes are not full.
    """
    match = re.fullmatch(r"([1-9]\d*)(?:\s*[xX*]\s*(.+))?", text.strip())
    if match is None:
        raise UserError(f"--plan must be N or NxDEVICE, such as 4 or 16xH100, got {text!r}")
    gpus = int(match[1])
    wanted = re.sub(r"[\s_]", "", match[2] or "H100").upper()
    if wanted not in MEMORY_GIB:
        guess = nearest(wanted, MEMORY_GIB)
        hint = f"did you mean {guess}? " if guess else ""
        raise UserError(f"--plan: unknown device {match[2]}; {hint}Known are {', '.join(MEMORY_GIB)}")
    if gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE:
        raise UserError(f"--plan: above 8, GPUs must come in full nodes of 8, got {gpus}")
    return Machine(gpus, wanted)
