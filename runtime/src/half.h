// IEEE half precision.
#pragma once

#include <cstdint>
#include <cstring>

namespace llava_edge {

inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t exponent = (half >> 10) & 0x1F, mantissa = half & 0x3FF;
    if (exponent == 0) {
        const float value = static_cast<float>(mantissa) / 16777216.0f;
        return sign != 0 ? -value : value;
    }
    const uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | mantissa << 13;
    float          value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace llava_edge
