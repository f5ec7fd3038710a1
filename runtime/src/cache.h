// What is in the KV cache, unit by unit, so that nothing is evaluated twice. Units are reused whole or not at all: the
// same tokens in another split give slightly other logits.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "prompt.h"

namespace llava_edge {

using Embeddings = std::shared_ptr<const std::vector<float>>;  // [tokens, n_embd] of a picture
using Pictures   = std::map<std::string, Embeddings>;          // by key

// Tokens of a prompt: all of them, those that were in the cache, and those of pictures.
struct Prefill {
    int tokens = 0, cached = 0, image = 0;
};

class KvCache {
  public:
    explicit KvCache(Engine & engine) : engine_(engine) {}

    int tokens() const { return entries_.empty() ? 0 : entries_.back().end; }
    int free() const { return engine_.n_ctx - tokens(); }

    // Bring the cache to hold exactly these units, with logits for the last one. Fails (CONTEXT_FULL) if they and one
    // more token don't fit; the cache is as it was.
    Prefill prefill(const std::vector<Unit> & units, const Pictures & pictures);
    // Evaluate one more token of an answer.
    void append(llama_token token);
    // How many of these units the cache holds; 0 if it holds something else too.
    size_t held(const std::vector<Unit> & units) const;
    // Put a saved state of these units in place of what the cache holds.
    void restore(const std::vector<Unit> & units, const Pictures & pictures, const std::vector<uint8_t> & state);

  private:
    struct Entry {
        Unit unit;
        int  end;  // tokens in the cache up to the unit's end
    };

    int    size_of(const Unit & unit, const Pictures & pictures) const;
    size_t keep(size_t count);

    Engine &           engine_;
    std::vector<Entry> entries_;  // never ahead of the cache
};

}  // namespace llava_edge
