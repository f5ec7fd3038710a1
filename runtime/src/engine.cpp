#include "engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gguf_header.h"

namespace llava_edge {

namespace {

constexpr int DEFAULT_CTX = 4096, MAX_BATCH = 512;
// Keys of this project in a GGUF, for what llama.cpp's tokenizer leaves out.
constexpr const char * ONE_SPACE_KEY = "llava_edge.tokenizer.one_space_prefix";
constexpr const char * BLANK         = "\xe2\x96\x81";

const char * explain(int status) {
    switch (status) {
        case 1:
            return "the context has no room for the batch";
        case -1:
            return "the batch is invalid";
        default:
            return "its evaluation failed";
    }
}

}  // namespace

Engine::Engine(const std::string & path, int n_ctx_wanted, int threads, int gpu_layers, const StopFlag & stop)
    : n_threads(threads), n_gpu_layers(gpu_layers), stop_(stop) {
    check_llm(read_gguf_header(path));
    load(path);
    make_context(n_ctx_wanted);
}

void Engine::load(const std::string & path) {
    llama_model_params params = llama_model_default_params();
    if (n_gpu_layers < 0 && !llama_supports_gpu_offload()) {
        n_gpu_layers = 0;
    }
    params.n_gpu_layers    = n_gpu_layers;
    // Compiled by GCC 12 and earlier, llama.cpp crashes at its first product with Intel's AMX
    // (https://github.com/ggml-org/llama.cpp/issues/20824); it then rearranges no weights at all.
    params.use_extra_bufts = std::strstr(llama_print_system_info(), "AMX_INT8 = 1") == nullptr;
    model_.reset(llama_model_load_from_file(path.c_str(), params));
    if (!model_) {
        fail(LLAVA_EDGE_MODEL_INVALID, "%s can't be loaded as a language model; the log says more", path.c_str());
    }
    if (llama_model_has_encoder(model_.get()) || !llama_model_has_decoder(model_.get())) {
        fail(LLAVA_EDGE_MODEL_UNSUPPORTED, "%s is not a decoder-only language model", path.c_str());
    }
    vocab_ = llama_model_get_vocab(model_.get());
    // The blank that llama.cpp puts in front of a text is one too many where there is one already.
    one_space_  = has_flag("tokenizer.ggml.add_space_prefix") && has_flag(ONE_SPACE_KEY);
    n_vocab     = llama_vocab_n_tokens(vocab_);
    n_embd      = llama_model_n_embd_inp(model_.get());
    n_ctx_train = llama_model_n_ctx_train(model_.get());
}

void Engine::make_context(int n_ctx_wanted) {
    llama_context_params params = llama_context_default_params();
    const int            places = n_ctx_wanted != 0 ? n_ctx_wanted : std::min(DEFAULT_CTX, n_ctx_train);
    params.n_ctx                = static_cast<uint32_t>(places);
    params.n_batch = params.n_ubatch = static_cast<uint32_t>(std::min(MAX_BATCH, places));
    params.n_seq_max                 = 1;
    params.n_outputs_max             = 1;  // only the last logits are ever read
    params.n_threads = params.n_threads_batch = n_threads;
    params.kv_unified                         = true;
    params.no_perf                            = true;
    params.abort_callback      = [](void * data) { return static_cast<const StopFlag *>(data)->wanted(); };
    params.abort_callback_data = const_cast<StopFlag *>(&stop_);
    context_.reset(llama_init_from_model(model_.get(), params));
    if (!context_) {
        fail(LLAVA_EDGE_OUT_OF_MEMORY, "no room for a context of %d tokens", places);
    }
    n_ctx   = static_cast<int>(llama_n_ctx_seq(context_.get()));
    n_batch = static_cast<int>(llama_n_batch(context_.get()));
    if (n_ctx > n_ctx_train) {
        log_line(LLAVA_EDGE_LOG_WARNING, format("a context of %d tokens; the model has learnt with %d", n_ctx, n_ctx_train));
    }
}

bool Engine::has_flag(const char * key) const {
    char text[16];
    return llama_model_meta_val_str(model_.get(), key, text, sizeof text) >= 0 && std::strcmp(text, "true") == 0;
}

std::vector<llama_token> Engine::tokenize(std::string_view text, bool special) const {
    const bool blank = !text.empty() && text[0] == ' ', spm_blank = text.compare(0, 3, BLANK) == 0;
    if (one_space_ && (blank || spm_blank)) {
        text.remove_prefix(blank ? 1 : 3);
        if (text.empty()) {  // llama.cpp would make two of it, and nothing of an empty text
            std::vector<llama_token> ids(8);
            const int                found = llama_tokenize(vocab_, "\n", 1, ids.data(), 8, false, special);
            ids.resize(static_cast<size_t>(std::clamp(found, 0, 1)));
            return ids;
        }
    }
    if (text.size() > (size_t(1) << 30)) {
        fail(LLAVA_EDGE_INVALID_ARGUMENT, "a text of %zu bytes is too long for the tokenizer", text.size());
    }
    std::vector<llama_token> ids(text.size() + 8);
    const auto               run = [&] {
        return llama_tokenize(vocab_, text.data(), static_cast<int32_t>(text.size()), ids.data(), static_cast<int32_t>(ids.size()), false, special);
    };
    int found = run();
    if (found == INT32_MIN) {
        fail(LLAVA_EDGE_INVALID_ARGUMENT, "a text of %zu bytes is too long for the tokenizer", text.size());
    }
    if (found < 0) {
        ids.resize(static_cast<size_t>(-found));
        found = run();
    }
    ids.resize(static_cast<size_t>(std::max(found, 0)));
    return ids;
}

std::string Engine::piece(llama_token token) const {
    std::string text(64, '\0');
    int         length = llama_token_to_piece(vocab_, token, text.data(), 64, 0, false);
    if (length < 0) {
        text.resize(static_cast<size_t>(-length));
        length = llama_token_to_piece(vocab_, token, text.data(), -length, 0, false);
    }
    text.resize(static_cast<size_t>(std::max(length, 0)));
    return text;
}

std::string Engine::token_text(llama_token token) const {
    const char * text = llama_vocab_get_text(vocab_, token);
    return text != nullptr ? text : "";
}

bool Engine::is_end(llama_token token) const {
    return llama_vocab_is_eog(vocab_, token);
}

bool Engine::is_control(llama_token token) const {
    return (llama_vocab_get_attr(vocab_, token) & LLAMA_TOKEN_ATTR_CONTROL) != 0 || is_end(token);
}

bool Engine::is_user_defined(llama_token token) const {
    return (llama_vocab_get_attr(vocab_, token) & LLAMA_TOKEN_ATTR_USER_DEFINED) != 0;
}

bool Engine::strips_right(llama_token token) const {
    return (llama_vocab_get_attr(vocab_, token) & LLAMA_TOKEN_ATTR_RSTRIP) != 0;
}

bool Engine::is_spm() const {
    return llama_vocab_type(vocab_) == LLAMA_VOCAB_TYPE_SPM;
}

void Engine::decode_tokens(const std::vector<llama_token> & tokens, bool logits) {
    for (const llama_token token : tokens) {
        if (token < 0 || token >= n_vocab) {
            fail(LLAVA_EDGE_ENGINE, "token %d; expected numbers from 0 to %d", token, n_vocab - 1);
        }
    }
    decode_all(static_cast<int>(tokens.size()), logits, &tokens, nullptr);
}

void Engine::decode_embeddings(const std::vector<float> & embeddings, bool logits) {
    decode_all(static_cast<int>(embeddings.size() / static_cast<size_t>(n_embd)), logits, nullptr, embeddings.data());
}

void Engine::decode_all(int count, bool logits, const std::vector<llama_token> * tokens, const float * rows) {
    const int start = n_past_;
    try {
        for (int from = 0; from < count; from += n_batch) {
            const int   n     = std::min(n_batch, count - from);
            llama_batch batch = {};
            if (tokens != nullptr) {
                batch.token = const_cast<llama_token *>(tokens->data()) + from;
            } else {
                batch.embd = const_cast<float *>(rows) + size_t(from) * size_t(n_embd);
            }
            decode(batch, n, logits && from + n == count);
        }
    } catch (...) {
        truncate(start);
        throw;
    }
}

void Engine::decode(llama_batch & batch, int count, bool logits) {
    const size_t                n = static_cast<size_t>(count);
    std::vector<llama_pos>      places(n);
    std::vector<int32_t>        counts(n, 1);
    llama_seq_id                sequence = 0;
    std::vector<llama_seq_id *> sequences(n, &sequence);
    std::vector<int8_t>         outputs(n, 0);
    for (int i = 0; i < count; i++) {
        places[static_cast<size_t>(i)] = n_past_ + i;
    }
    outputs.back()   = logits ? 1 : 0;
    batch.n_tokens   = count;
    batch.pos        = places.data();
    batch.n_seq_id   = counts.data();
    batch.seq_id     = sequences.data();
    batch.logits     = outputs.data();
    const int status = llama_decode(context_.get(), batch);
    if (status == 2) {
        fail(LLAVA_EDGE_STOPPED, "the evaluation was stopped");
    }
    if (status != 0) {
        fail(LLAVA_EDGE_ENGINE, "llama.cpp can't evaluate a batch: %s (%d)", explain(status), status);
    }
    n_past_ += count;
}

const float * Engine::logits() {
    const float * found = llama_get_logits_ith(context_.get(), -1);
    if (found == nullptr) {
        fail(LLAVA_EDGE_INTERNAL, "there are no logits");
    }
    return found;
}

bool Engine::truncate(int n_past) {
    const llama_memory_t memory = llama_get_memory(context_.get());
    const bool           kept   = llama_memory_seq_rm(memory, 0, n_past, -1);
    if (!kept) {
        llama_memory_seq_rm(memory, 0, -1, -1);
    }
    n_past_ = kept ? n_past : 0;
    return kept;
}

std::vector<uint8_t> Engine::save_state() {
    std::vector<uint8_t> state(llama_state_seq_get_size(context_.get(), 0));
    if (llama_state_seq_get_data(context_.get(), state.data(), state.size(), 0) != state.size()) {
        fail(LLAVA_EDGE_ENGINE, "the state of the cache does not fit %zu bytes", state.size());
    }
    return state;
}

void Engine::restore_state(const std::vector<uint8_t> & state, int n_past) {
    truncate(0);
    if (llama_state_seq_set_data(context_.get(), state.data(), state.size(), 0) != state.size()) {
        truncate(0);
        fail(LLAVA_EDGE_STATE_INVALID, "the state of %zu bytes does not belong to this model", state.size());
    }
    const llama_pos last = llama_memory_seq_pos_max(llama_get_memory(context_.get()), 0);
    if (last + 1 < n_past) {
        truncate(0);
        fail(LLAVA_EDGE_STATE_INVALID, "the state ends at position %d; the conversation has %d", last + 1, n_past);
    }
    truncate(n_past);
}

}  // namespace llava_edge
