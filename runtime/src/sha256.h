// SHA-256 (FIPS 180-4).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace llava_edge {

class Sha256 {
  public:
    void add(const void * data, size_t size);
    // The digest's 32 bytes; nothing can be added after that.
    std::string digest();

  private:
    void block(const uint8_t * data);

    uint32_t state_[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
    uint8_t  buffer_[64] = {};
    uint64_t size_       = 0;
};

}  // namespace llava_edge
