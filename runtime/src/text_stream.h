// Bytes of tokens to text that can be shown: whole characters, and nothing that may become a stop text.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace llava_edge {

class TextStream {
  public:
    explicit TextStream(std::vector<std::string> stop) : stop_(std::move(stop)) {}

    // Text that is sure to be part of the answer.
    std::string push(std::string_view bytes);
    // What was held back, once nothing more comes. A character that was cut off is left out.
    std::string flush();
    // Whether a stop text has come.
    bool stopped() const { return stopped_; }
    // Whether text is held back that may still become a stop text.
    bool undecided() const { return !held_.empty(); }

  private:
    void        decode(std::string_view bytes);
    std::string take(size_t count);

    std::vector<std::string> stop_;
    std::string              bytes_, held_;  // half a character; text
    bool                     stopped_ = false;
};

}  // namespace llava_edge
