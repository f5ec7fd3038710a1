#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "error.h"

namespace llava_edge {

namespace {

// 128 bits in two halves; not every compiler has them whole.
struct Wide {
    uint64_t high, low;
};

Wide add(Wide a, Wide b) {
    const uint64_t low = a.low + b.low;
    return { a.high + b.high + (low < a.low ? 1 : 0), low };
}

Wide multiply(Wide a, Wide b) {
    const uint64_t a0 = a.low & 0xffffffff, a1 = a.low >> 32, b0 = b.low & 0xffffffff, b1 = b.low >> 32;
    const uint64_t p00 = a0 * b0, p01 = a0 * b1, p10 = a1 * b0, p11 = a1 * b1;
    const uint64_t middle = (p00 >> 32) + (p01 & 0xffffffff) + (p10 & 0xffffffff);
    const uint64_t high   = p11 + (p01 >> 32) + (p10 >> 32) + (middle >> 32);
    return { high + a.high * b.low + a.low * b.high, (middle << 32) | (p00 & 0xffffffff) };
}

constexpr Wide MULTIPLIER = { 2549297995355413924ull, 4865540595714422341ull };

// The words that SeedSequence(seed).generate_state(4, uint64) gives.
std::array<uint64_t, 4> seed_words(uint32_t seed) {
    uint32_t   hash = 0x43b0d7e5;
    const auto mixed_in = [&](uint32_t value) {
        value ^= hash;
        hash *= 0x931e8875;
        value *= hash;
        return value ^ value >> 16;
    };
    std::array<uint32_t, 4> pool{};
    for (size_t i = 0; i < 4; i++) {
        pool[i] = mixed_in(i == 0 ? seed : 0);
    }
    for (size_t from = 0; from < 4; from++) {
        for (size_t to = 0; to < 4; to++) {
            if (from != to) {
                const uint32_t value = 0xca01f9dd * pool[to] - 0x4973f715 * mixed_in(pool[from]);
                pool[to]             = value ^ value >> 16;
            }
        }
    }
    std::array<uint64_t, 4> words{};
    hash = 0x8b51f9dd;
    for (size_t i = 0; i < 8; i++) {
        uint32_t value = pool[i % 4] ^ hash;
        hash *= 0x58f38ded;
        value *= hash;
        value ^= value >> 16;
        words[i / 2] |= uint64_t(value) << (32 * (i % 2));
    }
    return words;
}

std::vector<double> softmax(std::vector<double> scores) {
    const double most = *std::max_element(scores.begin(), scores.end());
    double       sum  = 0;
    for (double & score : scores) {
        score = std::exp(score - most);
        sum += score;
    }
    for (double & score : scores) {
        score /= sum;
    }
    return scores;
}

}  // namespace

Random::Random(uint32_t seed) {
    const auto words = seed_words(seed);
    increment_high_  = words[2] << 1 | words[3] >> 63;
    increment_low_   = words[3] << 1 | 1;
    step();
    const Wide state = add({ state_high_, state_low_ }, { words[0], words[1] });
    state_high_      = state.high;
    state_low_       = state.low;
    step();
}

void Random::step() {
    const Wide state = add(multiply({ state_high_, state_low_ }, MULTIPLIER), { increment_high_, increment_low_ });
    state_high_      = state.high;
    state_low_       = state.low;
}

double Random::next() {
    step();
    const uint64_t mixed = state_high_ ^ state_low_;
    const auto     turns = static_cast<unsigned>(state_high_ >> 58);
    const uint64_t value = mixed >> turns | mixed << (-turns & 63);
    return static_cast<double>(value >> 11) * (1.0 / 9007199254740992.0);
}

int Sampler::choose(const float * logits, int n_vocab) {
    int best = 0;
    for (int i = 0; i < n_vocab; i++) {
        if (std::isnan(logits[i])) {
            best = i;
            break;
        }
        best = logits[i] > logits[best] ? i : best;
    }
    if (!std::isfinite(logits[best])) {
        fail(LLAVA_EDGE_MODEL_INVALID, "the model gave logits that are not numbers: its file is damaged, or overflows");
    }
    if (params_.temperature <= 0) {
        return best;
    }
    const std::vector<int> ids = likeliest(logits, n_vocab);
    std::vector<double>    scores;
    for (const int id : ids) {
        scores.push_back(static_cast<double>(logits[id]));
    }
    // Enough of the likeliest to make up top_p, and always the first.
    const auto          probabilities = softmax(scores);
    std::vector<int>    kept;
    std::vector<double> left;
    double              sum = 0;
    for (size_t i = 0; i < ids.size(); i++) {
        const double before = (sum + probabilities[i]) - probabilities[i];
        sum += probabilities[i];
        const bool within = params_.top_p >= 1 || before < params_.top_p;  // rounded sums must not cut when it is off
        if (i == 0 || (within && probabilities[i] >= params_.min_p * probabilities[0])) {
            kept.push_back(ids[i]);
            left.push_back(scores[i] / params_.temperature);
        }
    }
    left               = softmax(left);
    const double point = random_.next() * std::accumulate(left.begin(), left.end(), 0.0);
    double       share = 0;
    for (size_t i = 0; i < kept.size(); i++) {
        share += left[i];
        if (point < share) {
            return kept[i];
        }
    }
    return kept.back();
}

// Ids in falling order of their logits, equal ones in rising order of the id; all of them if top_k is 0.
std::vector<int> Sampler::likeliest(const float * logits, int n_vocab) const {
    std::vector<int> ids(static_cast<size_t>(n_vocab));
    std::iota(ids.begin(), ids.end(), 0);
    const auto before = [&](int a, int b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    if (params_.top_k > 0 && params_.top_k < n_vocab) {
        std::partial_sort(ids.begin(), ids.begin() + params_.top_k, ids.end(), before);
        ids.resize(static_cast<size_t>(params_.top_k));
    } else {
        std::sort(ids.begin(), ids.end(), before);
    }
    return ids;
}

}  // namespace llava_edge
