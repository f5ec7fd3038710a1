// The language model: the only user of llama.cpp's text API.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <llama.h>

#include "error.h"
#include "stop_flag.h"

namespace llava_edge {

template <auto free> struct LlamaFreed {
    template <typename T> void operator()(T * object) const { free(object); }
};

// A loaded GGUF language model with its KV cache of one sequence. A call that fails leaves the cache as it was before.
class Engine {
  public:
    // `stop` ends an evaluation when another thread raises it.
    Engine(const std::string & path, int n_ctx, int n_threads, int n_gpu_layers, const StopFlag & stop);

    // Token ids of a text. Only with `special` do the names of control tokens become these tokens.
    std::vector<llama_token> tokenize(std::string_view text, bool special) const;
    // What a token adds to the answer, in UTF-8; part of a character may be cut off. Control tokens add nothing.
    std::string piece(llama_token token) const;
    // The token's entry in the vocabulary.
    std::string token_text(llama_token token) const;
    bool        is_end(llama_token token) const;
    bool        is_control(llama_token token) const;
    bool        is_user_defined(llama_token token) const;
    bool        strips_right(llama_token token) const;
    // Whether the vocabulary is SentencePiece's, whose words begin with their blank.
    bool is_spm() const;

    int n_past() const { return n_past_; }

    // Evaluate tokens after those in the cache; `logits` asks for those of the last one.
    void decode_tokens(const std::vector<llama_token> & tokens, bool logits);
    // Evaluate embeddings [tokens, n_embd].
    void decode_embeddings(const std::vector<float> & embeddings, bool logits);
    // Logits of the last evaluated token, [n_vocab].
    const float * logits();
    // Forget everything from a position on. False: the model can't, and everything is forgotten.
    bool truncate(int n_past);

    // The cache's content as bytes; it holds no logits.
    std::vector<uint8_t> save_state();
    void                 restore_state(const std::vector<uint8_t> & state, int n_past);

    int n_vocab = 0, n_embd = 0, n_ctx = 0, n_ctx_train = 0, n_batch = 0, n_threads = 0, n_gpu_layers = 0;

  private:
    void load(const std::string & path);
    void make_context(int n_ctx_wanted);
    void decode(llama_batch & batch, int count, bool logits);
    void decode_all(int count, bool logits, const std::vector<llama_token> * tokens, const float * rows);
    bool has_flag(const char * key) const;

    std::unique_ptr<llama_model, LlamaFreed<llama_model_free>> model_;
    std::unique_ptr<llama_context, LlamaFreed<llama_free>>     context_;
    const llama_vocab *                                        vocab_     = nullptr;
    const StopFlag &                                           stop_;
    bool                                                       one_space_ = false;
    int                                                        n_past_    = 0;
};

// Point llama.cpp's log at ours, once a process.
void start_llama();
void set_log(llava_edge_log_callback callback, void * user_data);
void log_line(llava_edge_log_level level, const std::string & line);

}  // namespace llava_edge
