#include "text_stream.h"

#include <algorithm>

namespace llava_edge {

namespace {

// Bytes of the character that begins here, 0 if it goes on beyond the end, or minus the length of what is no character.
int character(std::string_view text) {
    const auto lead = static_cast<unsigned char>(text[0]);
    const int  more = lead < 0x80 ? 0 : lead < 0xC2 ? -1 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : lead < 0xF5 ? 3 : -1;
    if (more <= 0) {
        return more < 0 ? -1 : 1;
    }
    for (int k = 1; k <= more; k++) {
        if (static_cast<size_t>(k) >= text.size()) {
            return 0;
        }
        const auto next = static_cast<unsigned char>(text[static_cast<size_t>(k)]);
        const int  low  = k > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        const int  high = k > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (next < low || next > high) {
            return -k;
        }
    }
    return more + 1;
}

}  // namespace

std::string TextStream::push(std::string_view bytes) {
    decode(bytes);
    size_t end = std::string::npos;
    for (const std::string & stop : stop_) {
        end = std::min(end, held_.find(stop));
    }
    if (end != std::string::npos) {
        stopped_ = true;
        return take(end);
    }
    // The longest end of the text with which a stop text begins may still become one.
    size_t undecided = 0;
    for (const std::string & stop : stop_) {
        for (size_t length = std::min(stop.size() - 1, held_.size()); length > undecided; length--) {
            if (held_.compare(held_.size() - length, length, stop, 0, length) == 0) {
                undecided = length;
            }
        }
    }
    return take(held_.size() - undecided);
}

std::string TextStream::flush() {
    return take(held_.size());
}

// What is no UTF-8 becomes the replacement character.
void TextStream::decode(std::string_view bytes) {
    bytes_ += bytes;
    size_t at = 0;
    while (at < bytes_.size()) {
        const int length = character(std::string_view(bytes_).substr(at));
        if (length == 0) {
            break;
        }
        held_ += length > 0 ? bytes_.substr(at, static_cast<size_t>(length)) : "\xef\xbf\xbd";
        at += static_cast<size_t>(length > 0 ? length : -length);
    }
    bytes_.erase(0, at);
}

std::string TextStream::take(size_t count) {
    std::string text = held_.substr(0, count);
    held_.erase(0, count);
    return text;
}

}  // namespace llava_edge
