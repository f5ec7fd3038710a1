// A prompt is a list of segments, and becomes runs of tokens with pictures between them. Scaffold is the text around the
// turns, in which the names of special tokens are parsed. User text never yields a special token.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bundle.h"
#include "engine.h"

namespace llava_edge {

struct Segment {
    enum class Kind { Scaffold, User, Image, Answer };

    Kind                     kind;
    std::string              text;  // of an image, its key
    std::vector<llama_token> ids;   // of an answer
};

// Tokens that are evaluated together, or a picture by its key.
struct Unit {
    std::vector<llama_token> ids;
    std::string              image;

    bool is_image() const { return !image.empty(); }
    bool operator==(const Unit & other) const { return ids == other.ids && image == other.image; }
};

// What stands between the answer before (nothing, for turn 0) and the answer to this question.
std::vector<Segment> turn_segments(const PromptFormat & format, size_t number, const std::vector<std::string> & images,
                                   const std::string & question, const std::optional<std::string> & system);

class PromptTokenizer {
  public:
    explicit PromptTokenizer(const Engine & engine) : engine_(engine) {}

    // Make the special tokens of a format known, so that they are kept out of all user text.
    void learn(const std::vector<Segment> & segments);
    // Runs of tokens with pictures between them. Each token of an answer is a run, as it was when it was made.
    std::vector<Unit> units(const std::vector<Segment> & segments);
    // Divide what ends an answer into special tokens and texts.
    void stop_tokens(const std::vector<std::string> & stop, std::vector<llama_token> & ids, std::vector<std::string> & texts);
    // Tokens of text that is taken by the letter: none of them is a special token.
    std::vector<llama_token> plain(const std::string & text) { return plain(text, 0); }

  private:
    struct Part {  // plain text, or a special token
        std::string text;
        llama_token token = -1;
    };

    const std::vector<Part> & parse(const std::string & scaffold);
    void                      add_run(std::vector<Part> & parts, std::vector<Unit> & units);
    std::vector<llama_token>  plain(const std::string & text, int depth);
    bool                      is_structural(llama_token token);

    const Engine &                           engine_;
    std::map<std::string, std::vector<Part>> parsed_;
    std::map<llama_token, bool>              structural_;
};

// Whether a token's name is of the kind that marks turns, pictures and ends.
bool is_marker(const std::string & name);

}  // namespace llava_edge
