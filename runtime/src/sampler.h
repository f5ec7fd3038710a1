// How the next token is chosen from the logits: the filters and the random numbers of llava_edge/sampling.py, so that a
// seed gives the same answer in both.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace llava_edge {

struct SamplingParams {
    double   temperature = 0, top_p = 0.95, min_p = 0.05;
    int      top_k = 40;
    uint32_t seed  = 0;
};

// NumPy's default_rng(seed).random(): PCG64 (XSL-RR), seeded through SeedSequence.
class Random {
  public:
    explicit Random(uint32_t seed);
    double next();  // from 0 to 1, without 1

  private:
    void step();

    uint64_t state_high_ = 0, state_low_ = 0, increment_high_ = 0, increment_low_ = 0;
};

class Sampler {
  public:
    explicit Sampler(const SamplingParams & params) : params_(params), random_(params.seed) {}

    // The next token; fails (MODEL_INVALID) if the logits are not numbers.
    int choose(const float * logits, int n_vocab);

  private:
    std::vector<int> likeliest(const float * logits, int n_vocab) const;

    SamplingParams params_;
    Random         random_;
};

}  // namespace llava_edge
