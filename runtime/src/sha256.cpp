#include "sha256.h"

#include <algorithm>
#include <cstring>

namespace llava_edge {

namespace {

constexpr uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

uint32_t turn(uint32_t x, int n) {
    return x >> n | x << (32 - n);
}

}  // namespace

void Sha256::add(const void * data, size_t size) {
    const auto * from = static_cast<const uint8_t *>(data);
    while (size > 0) {
        const size_t at = size_ % 64, n = std::min(size, 64 - at);
        std::memcpy(buffer_ + at, from, n);
        from += n;
        size -= n;
        size_ += n;
        if (size_ % 64 == 0) {
            block(buffer_);
        }
    }
}

std::string Sha256::digest() {
    const uint64_t bits = size_ * 8;
    const uint8_t  one = 0x80, zero = 0;
    add(&one, 1);
    while (size_ % 64 != 56) {
        add(&zero, 1);
    }
    uint8_t length[8];
    for (int i = 0; i < 8; i++) {
        length[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
    }
    add(length, 8);
    std::string out;
    for (const uint32_t word : state_) {
        for (int shift = 24; shift >= 0; shift -= 8) {
            out += static_cast<char>(word >> shift);
        }
    }
    return out;
}

void Sha256::block(const uint8_t * data) {
    uint32_t w[64];
    for (int i = 0; i < 16; i++) {
        w[i] = uint32_t(data[4 * i]) << 24 | uint32_t(data[4 * i + 1]) << 16 | uint32_t(data[4 * i + 2]) << 8 | data[4 * i + 3];
    }
    for (int i = 16; i < 64; i++) {
        const uint32_t a = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3;
        const uint32_t b = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i]             = w[i - 16] + a + w[i - 7] + b;
    }
    uint32_t s[8];
    std::copy(state_, state_ + 8, s);
    for (int i = 0; i < 64; i++) {
        const uint32_t e = turn(s[4], 6) ^ turn(s[4], 11) ^ turn(s[4], 25);
        const uint32_t f = s[7] + e + ((s[4] & s[5]) ^ (~s[4] & s[6])) + K[i] + w[i];
        const uint32_t a = turn(s[0], 2) ^ turn(s[0], 13) ^ turn(s[0], 22);
        const uint32_t m = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
        std::copy_backward(s, s + 7, s + 8);
        s[4] += f;
        s[0] = f + a + m;
    }
    for (int i = 0; i < 8; i++) {
        state_[i] += s[i];
    }
}

}  // namespace llava_edge
