// Linear layers with Q8_0 weights on x86: an own product for AVX2, because ggml rearranges Q8_0 weights only on Arm and
// RISC-V. Each block of 32 inputs is rounded to 128 steps between its least and its largest value, so that two products fit
// 16 bits without a sign to move. Sixteen rows of the weights lie side by side, so that the sums of eight outputs need no
// adding across a vector, and six tokens, so that what is fetched is used often. Elsewhere ggml's own products are used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

struct ggml_context;
struct ggml_tensor;

namespace llava_edge {

// What the values of an input go through first. Gelu is the one by the hyperbolic tangent.
enum class Activation { None, Gelu, QuickGelu };

class Q8Linear {
  public:
    // Whether this machine, and a layer of this shape, are served.
    static bool fits(int64_t in, int64_t out);

    // Take `out` rows of Q8_0 blocks, as a GGUF file has them.
    Q8Linear(const uint8_t * rows, int64_t in, int64_t out);

    // The product [out, T] of the activated x [in, T], with the bias [out] if there is one.
    ggml_tensor * multiply(ggml_context * context, ggml_tensor * x, ggml_tensor * bias, Activation activation) const;

    // The part of the product that thread `number` of `count` makes. `groups`: the input as quantize_op lays it out.
    void compute(const uint8_t * groups, int64_t tokens, const float * bias, float * to, int number, int count) const;

  private:
    int64_t             in_, out_;
    std::vector<int8_t> values_;  // [out / 16, in / 4, 16, 4]
    std::vector<float>  scales_;  // [out / 16, in / 32, 2, 16]: of a block, and that times the sum of its values
};

}  // namespace llava_edge
