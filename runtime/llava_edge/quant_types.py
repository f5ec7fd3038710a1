"""The types of model files by name, with a line on each. Bits are those of a weight, scales included."""

from __future__ import annotations

LLM_TYPES = {
    "F32": "32 bits: exact, for measurements",
    "F16": "16 bits: what others are measured against",
    "BF16": "16 bits with float32's range, for weights beyond float16's",
    "Q8_0": "8.5 bits: hard to tell from F16",
    "Q6_K": "6.6 bits: hardly any loss",
    "Q5_K_M": "5.7 bits: little loss",
    "Q5_K_S": "5.5 bits: a little smaller",
    "Q4_K_M": "4.8 bits: the usual choice",
    "Q4_K_S": "4.6 bits: a little smaller",
    "Q4_0": "4.5 bits: the fastest on many CPUs, with more loss",
    "IQ4_NL": "4.5 bits on an uneven scale, in blocks of 32",
    "Q3_K_M": "3.9 bits: clear loss",
    "Q3_K_S": "3.4 bits: more loss",
    "Q2_K": "2.6 bits: large loss, for what would not fit otherwise",
}
MMPROJ_TYPES = {name: LLM_TYPES[name] for name in ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")}
VISION_TYPES = {
    "fp32": "32 bits: exact",
    "int8": "8-bit weights: several times faster on a CPU with little loss",
    "none": "no ONNX file",
}
