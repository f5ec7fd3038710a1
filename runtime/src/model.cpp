#include "model.h"

#include <algorithm>

#include "sha256.h"
#include "threads.h"
#include "tower_file.h"

namespace llava_edge {

namespace {

// Embeddings of pictures that no conversation holds any more are kept up to this size.
constexpr size_t ENCODED_BYTES = 256 << 20;
constexpr double MIN_COSINE    = 0.99;

int threads_of(const llava_edge_model_params & params) {
    return params.n_threads != 0 ? params.n_threads : default_threads();
}

int tokens_of(const Bundle & bundle, int wanted) {
    const VisualTokens & tokens = bundle.visual_tokens;
    const int            count  = wanted != 0 ? wanted : tokens.standard;
    if (pooled_cell(tokens.rows, tokens.columns, count) == 0) {
        fail(LLAVA_EDGE_INVALID_ARGUMENT, "image_tokens is %d; %s can't pool its grid of %d x %d to that", count, bundle.name.c_str(),
             tokens.rows, tokens.columns);
    }
    return count;
}

}  // namespace

Model::Model(const std::string & directory, const llava_edge_model_params & params)
    : bundle(open_bundle(directory)),
      image_tokens(tokens_of(bundle, params.image_tokens)),
      engine(bundle.path("llm"), params.n_ctx, threads_of(params), params.n_gpu_layers, stop),
      tower(bundle.path("mmproj"), engine.n_threads, engine.n_gpu_layers != 0, &stop),
      tokenizer(engine),
      cache(engine) {
    check_tower();
    for (const size_t number : { 0, 1 }) {
        tokenizer.learn(turn_segments(bundle.prompt, number, { "picture" }, "?", std::nullopt));
        tokenizer.learn(turn_segments(bundle.prompt, number, {}, "?", std::nullopt));
    }
    tokenizer.stop_tokens(bundle.prompt.stop, stop_ids, stop_texts);
    if (params.self_check != 0 && bundle.probe) {
        self_check();
    }
}

void Model::check_tower() const {
    if (tower.n_embd() != engine.n_embd) {
        fail(LLAVA_EDGE_MODEL_INVALID, "%s makes embeddings of width %d; the language model reads %d: the files are of two models",
             bundle.path("mmproj").c_str(), tower.n_embd(), engine.n_embd);
    }
    if (tower.image_size() != bundle.image.size || tower.n_tokens() != bundle.visual_tokens.full) {
        fail(LLAVA_EDGE_MODEL_INVALID, "%s reads %d pixels a side and makes %d tokens; the manifest says %d and %d",
             bundle.path("mmproj").c_str(), tower.image_size(), tower.n_tokens(), bundle.image.size, bundle.visual_tokens.full);
    }
    if (bundle.image.mode == FitMode::Anyres && tower.newline().empty()) {
        fail(LLAVA_EDGE_MODEL_INVALID, "%s has no tensor %s, which ends the rows of tiles", bundle.path("mmproj").c_str(), NEWLINE);
    }
}

void Model::self_check() {
    const Image  picture = probe_picture(bundle.image.size);
    const double cosine  = probe_cosine(*bundle.probe, tower.encode(picture.rgb.data(), size_t(picture.width) * 3), tower.n_embd());
    if (!(cosine >= MIN_COSINE)) {
        fail(LLAVA_EDGE_SELF_CHECK_FAILED,
             "the vision tower is wrong on this machine: its embeddings of the probe picture have a cosine of %.3f to the expected "
             "ones, at least %.2f is needed",
             cosine, MIN_COSINE);
    }
    log_line(LLAVA_EDGE_LOG_INFO, format("self-check of the vision tower passed, cosine %.5f", cosine));
}

Embeddings Model::encode(const Picture & picture) {
    for (auto it = encoded_.begin(); it != encoded_.end(); ++it) {
        if (it->first == picture.key) {
            encoded_.splice(encoded_.begin(), encoded_, it);
            return it->second;
        }
    }
    const VisualTokens &            tokens = bundle.visual_tokens;
    std::vector<std::vector<float>> parts;
    for (const Image & part : picture.parts) {
        parts.push_back(pool(tower.encode(part.rgb.data(), size_t(part.width) * 3), tokens.rows, tokens.columns, image_tokens));
    }
    if (bundle.image.mode == FitMode::Anyres) {
        const int cell = pooled_cell(tokens.rows, tokens.columns, image_tokens);
        parts[0] = assemble(parts, tokens.rows / cell, tokens.columns / cell, picture.layout, bundle.image.max_tiles, tower.newline());
    }
    const auto found = std::make_shared<const std::vector<float>>(std::move(parts[0]));
    remember(picture.key, found);
    return found;
}

void Model::remember(const std::string & key, const Embeddings & embeddings) {
    encoded_.emplace_front(key, embeddings);
    size_t bytes = 0;
    for (auto it = encoded_.begin(); it != encoded_.end(); ++it) {
        bytes += it->second->size() * sizeof(float);
        if (bytes > ENCODED_BYTES && it != encoded_.begin()) {
            encoded_.erase(it, encoded_.end());
            break;
        }
    }
}

std::string Model::fingerprint() const {
    Sha256 hash;
    hash.add(bundle.digest.data(), bundle.digest.size());
    const std::string settings = format("%d %d %s %s", image_tokens, engine.n_gpu_layers, llama_version(), llava_edge_version());
    hash.add(settings.data(), settings.size());
    return hash.digest();
}

}  // namespace llava_edge
