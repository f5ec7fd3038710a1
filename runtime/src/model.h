// A model in memory, and the conversations with it.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cache.h"
#include "image.h"
#include "prompt.h"
#include "sampler.h"
#include "text_stream.h"
#include "tiles.h"
#include "tower.h"

namespace llava_edge {

// A picture by the hash of its content, encoded when it is needed: one of the tower's size, or the whole and its tiles.
struct Picture {
    std::string        key;
    std::vector<Image> parts;
    Layout             layout;
};

class Model {
  public:
    Model(const std::string & directory, const llava_edge_model_params & params);

    // The picture's embeddings. A picture is encoded once as long as they are remembered.
    Embeddings encode(const Picture & picture);
    // Remember embeddings under a key.
    void remember(const std::string & key, const Embeddings & embeddings);

    // What a saved session belongs to: the files, the settings, the version of llama.cpp.
    std::string fingerprint() const;

    StopFlag                 stop;  // outlives the engine, which looks at it
    Bundle                   bundle;
    int                      image_tokens;
    Engine                   engine;
    Tower                    tower;
    PromptTokenizer          tokenizer;
    KvCache                  cache;
    std::vector<llama_token> stop_ids;
    std::vector<std::string> stop_texts;

    // Calls on a model and its sessions wait for each other.
    std::mutex                   mutex;
    std::atomic<std::thread::id> owner{};

  private:
    void check_tower() const;
    void self_check();

    std::list<std::pair<std::string, Embeddings>> encoded_;  // the latest first
};

struct GenerateParams {
    int                      max_tokens = 256;
    SamplingParams           sampling;
    std::vector<std::string> stop;
};

struct Answer {
    std::string              text;
    std::vector<llama_token> ids;
    Prefill                  prefill;
    llava_edge_finish_reason finish = LLAVA_EDGE_FINISH_CANCELLED;
    double                   encode_seconds = 0, prefill_seconds = 0, ttft_seconds = 0, decode_seconds = 0;
};

// A question and its answer. It holds its pictures' embeddings, so that they are never made twice.
struct Turn {
    std::string                                      question, answer;
    std::vector<std::pair<std::string, Embeddings>>  pictures;
    std::vector<llama_token>                         ids;
    bool                                             given = false;  // the answer is the program's own text
};

class Session {
  public:
    explicit Session(Model & owner) : model(owner) {}

    void add_image(Image image);
    void add_text(llava_edge_role role, const std::string & text);
    // Answer the question that was added. The piece of each token goes to `show`, which may end the answer.
    const Answer & generate(const GenerateParams & params, const std::function<bool(const std::string &)> & show);
    void           truncate(size_t n_turns);
    void           reset();
    void           save(const std::string & path);
    void           load(const std::string & path);
    // End all calls of generate that have a number by now. Any thread.
    void           stop();

    Model &           model;
    std::vector<Turn> turns;
    Answer            answer;  // the last one

    // Written by the call whose turn it is, and read by any thread.
    std::atomic<int>      turn_count{ 0 };
    std::atomic<int>      tokens{ 0 };   // of the cache, after the last evaluation
    std::atomic<uint64_t> calls{ 0 };    // of generate: each takes its number before it waits, so that no stop is lost
    std::atomic<uint64_t> stopped{ 0 };  // calls up to this number are to end

  private:
    std::vector<Unit> units(const Turn * next);
    Turn              prepare(std::chrono::steady_clock::time_point started);
    void              loop(const GenerateParams & params, const std::function<bool(const std::string &)> & show);
    Pictures          pictures(const Turn * next) const;

    std::optional<std::string> system_;
    std::vector<Picture>       pending_;
    std::string                question_;
    bool                       asked_ = false;
};

}  // namespace llava_edge
