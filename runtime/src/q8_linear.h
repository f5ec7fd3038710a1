// Linear layers with Q8_0 weights on x86: an own product for AVX2, because ggml rearranges Q8_0 weights only on Arm and
// RISC-V. Eight rows of the weights lie side by side, so that a vector holds four of their values each, and the sums of
// eight outputs need no adding across a vector. Elsewhere ggml's own products are used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

struct ggml_context;
struct ggml_tensor;

namespace llava_edge {

class Q8Linear {
  public:
    // Whether this machine, and a layer of this shape, are served.
    static bool fits(int64_t in, int64_t out);

    // Take `out` rows of Q8_0 blocks, as a GGUF file has them.
    Q8Linear(const uint8_t * rows, int64_t in, int64_t out);

    // Rows [in, T] to what `multiply` reads. Layers with the same input may share it.
    static ggml_tensor * quantize(ggml_context * context, ggml_tensor * x);
    // The product [out, T], with the bias [out] if there is one.
    ggml_tensor * multiply(ggml_context * context, ggml_tensor * quantized, ggml_tensor * bias) const;

    // The part of the product that thread `number` of `count` makes. `rows` is [T, in + in / 8] bytes.
    void compute(const uint8_t * rows, int64_t tokens, const float * bias, float * to, int number, int count) const;

  private:
    int64_t              in_, out_;
    std::vector<uint8_t> values_;  // [out / 8, in / 4, 8, 4] signed
    std::vector<float>   scales_;  // [out / 8, in / 32, 8]
};

}  // namespace llava_edge
