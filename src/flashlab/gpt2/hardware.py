"""What GPUs can do at most, for model FLOPs utilisation."""

import re

# Dense bfloat16 products with sums in float32, in TFLOP/s, by the name that the driver gives. A part of a GPU (MIG) has
# another name, and is not known. Sources: NVIDIA's data sheets of A100 (2021), H100 (2023), H200 (2024), B200 (2025),
# L4, L40S and A10, of which those from Hopper on print twice as much, for sparse matrices; and the white papers of the
# GeForce RTX 3090 (GA102) and 4090 (Ada), appendix A; AMD's data sheet of MI300X (2023).
PEAK_TFLOPS = {
    r"A100[- ].*": 312.0,
    r"H100 80GB HBM3|H100 SXM.*": 989.4,
    r"H100 PCIe": 756.0,
    r"H100 NVL": 835.5,
    r"H200": 989.4,
    r"H200 NVL": 835.5,
    r"GH200 .*": 989.4,
    r"B200": 2250.0,
    r"L4": 121.0,
    r"L40S": 362.0,
    r"A10": 125.0,
    r"GeForce RTX 3090": 71.0,
    r"GeForce RTX 4090": 165.2,
    r"AMD Instinct MI300X": 1307.4,
}


def peak_flops(name: str, precision: str) -> float | None:
    """Return the floating-point operations per second that a GPU can do at most, or None where that is not known.

    Args:
        name: of the GPU, as the driver gives it.
        precision: of Lightning; only bf16-mixed is known.
    """
    if precision != "bf16-mixed" or "MIG" in name:
        return None
    short = name.removeprefix("NVIDIA ")
    return next((1e12 * peak for pattern, peak in PEAK_TFLOPS.items() if re.fullmatch(pattern, short)), None)
