#include "cache.h"

namespace llava_edge {

int KvCache::size_of(const Unit & unit, const Pictures & pictures) const {
    return static_cast<int>(unit.is_image() ? pictures.at(unit.image)->size() / static_cast<size_t>(engine_.n_embd) : unit.ids.size());
}

Prefill KvCache::prefill(const std::vector<Unit> & units, const Pictures & pictures) {
    Prefill prefill;
    for (const Unit & unit : units) {
        const int size = size_of(unit, pictures);
        prefill.tokens += size;
        prefill.image += unit.is_image() ? size : 0;
        if (prefill.tokens >= engine_.n_ctx) {
            fail(LLAVA_EDGE_CONTEXT_FULL, "the prompt has %d tokens or more and the context %d; an answer needs room too", prefill.tokens, engine_.n_ctx);
        }
    }
    // The last unit is evaluated again, because only that gives its logits.
    size_t common = 0;
    while (common < entries_.size() && common + 1 < units.size() && entries_[common].unit == units[common]) {
        common++;
    }
    const size_t kept = keep(common);
    prefill.cached    = tokens();
    for (size_t i = kept; i < units.size(); i++) {
        const Unit & unit = units[i];
        const bool   last = i + 1 == units.size();
        if (unit.is_image()) {
            engine_.decode_embeddings(*pictures.at(unit.image), last);
        } else {
            engine_.decode_tokens(unit.ids, last);
        }
        entries_.push_back({ unit, tokens() + size_of(unit, pictures) });
    }
    return prefill;
}

void KvCache::append(llama_token token) {
    engine_.decode_tokens({ token }, true);
    entries_.push_back({ { { token }, "" }, tokens() + 1 });
}

size_t KvCache::held(const std::vector<Unit> & units) const {
    if (units.size() < entries_.size()) {
        return 0;
    }
    for (size_t i = 0; i < entries_.size(); i++) {
        if (!(entries_[i].unit == units[i])) {
            return 0;
        }
    }
    return entries_.size();
}

void KvCache::restore(const std::vector<Unit> & units, const Pictures & pictures, const std::vector<uint8_t> & state) {
    std::vector<Entry> restored;
    for (const Unit & unit : units) {
        restored.push_back({ unit, (restored.empty() ? 0 : restored.back().end) + size_of(unit, pictures) });
    }
    const int end = restored.empty() ? 0 : restored.back().end;
    if (end > engine_.n_ctx) {
        fail(LLAVA_EDGE_CONTEXT_FULL, "the saved session has %d tokens and the context %d", end, engine_.n_ctx);
    }
    entries_.clear();
    engine_.restore_state(state, end);
    entries_ = std::move(restored);
}

// Cut the list first and the cache to fit it; 0 if the model can only forget everything.
size_t KvCache::keep(size_t count) {
    entries_.resize(count, { {}, 0 });
    if (!engine_.truncate(tokens())) {
        entries_.clear();
    }
    return entries_.size();
}

}  // namespace llava_edge
