#include "prompt.h"

#include <algorithm>

namespace llava_edge {

namespace {

// Names of special tokens that are cut out of one text, each within what the last cut left.
constexpr int MAX_CUTS = 256;

constexpr const char * BLANKS = " \t\n\r\v\f\x1c\x1d\x1e\x1f";

std::string lowered(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](char c) { return c >= 'A' && c <= 'Z' ? char(c + 32) : c; });
    return text;
}

bool begins(const std::string & text, const std::string & start) {
    return text.compare(0, start.size(), start) == 0;
}

bool ends(const std::string & text, const std::string & end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

size_t first_character(const std::string & text) {
    size_t length = 1;
    while (length < text.size() && (static_cast<unsigned char>(text[length]) & 0xC0) == 0x80) {
        length++;
    }
    return length;
}

void add_opening(std::vector<Segment> & segments, const PromptFormat & format, const std::optional<std::string> & system) {
    segments.push_back({ Segment::Kind::Scaffold, format.bos, {} });
    const std::string text = system.value_or(format.default_system.value_or(""));
    if (text.empty()) {
        return;
    }
    if (format.system.empty()) {
        fail(LLAVA_EDGE_INVALID_ARGUMENT, "this model's conversation format has no place for a system text");
    }
    const size_t at = format.system.find("{system}");
    segments.push_back({ Segment::Kind::Scaffold, format.system.substr(0, at), {} });
    segments.push_back({ Segment::Kind::User, text, {} });
    segments.push_back({ Segment::Kind::Scaffold, format.system.substr(at + 8), {} });
}

}  // namespace

bool is_marker(const std::string & name) {
    const std::string text = lowered(name);
    const std::string wide = "\xef\xbd\x9c";  // the full-width bar
    for (const std::string & open : { std::string("|"), wide }) {
        for (const std::string & close : { std::string("|"), wide }) {
            if (begins(text, "<" + open) && ends(text, close + ">") && text.size() >= open.size() + close.size() + 2) {
                return true;
            }
        }
    }
    if (text == "<s>" || text == "</s>") {
        return true;
    }
    if (begins(text, "[") && ends(text, "]")) {
        const std::string inner = text.substr(begins(text, "[/") ? 2 : 1);
        return inner.size() > 1 && inner.find_first_not_of("abcdefghijklmnopqrstuvwxyz_") == inner.size() - 1;
    }
    if (!begins(text, "<") || text.find('>') != text.size() - 1) {
        return false;
    }
    const std::string inner = text.substr(1, text.size() - 2);
    for (const char * word : { "image", "img", "vision", "video", "audio", "media", "turn", "user", "assistant", "system", "eos",
                               "eot", "bos", "pad", "unk" }) {
        if (inner.find(word) != std::string::npos) {
            return true;
        }
    }
    return false;
}

std::vector<Segment> turn_segments(const PromptFormat & format, size_t number, const std::vector<std::string> & images,
                                   const std::string & question, const std::optional<std::string> & system) {
    std::vector<Segment> segments;
    const auto           scaffold = [&](const std::string & text) { segments.push_back({ Segment::Kind::Scaffold, text, {} }); };
    if (number == 0) {
        add_opening(segments, format, system);
    } else {
        scaffold(format.turn_end);
    }
    scaffold(format.user_prefix);
    for (const std::string & image : images) {
        segments.push_back({ Segment::Kind::Image, image, {} });
        scaffold(format.image_suffix);
    }
    if (images.empty() && !format.text_prefix.empty()) {
        scaffold(format.text_prefix);
    }
    segments.push_back({ Segment::Kind::User, question, {} });
    scaffold(format.user_suffix);
    scaffold(format.assistant_prefix);
    return segments;
}

void PromptTokenizer::learn(const std::vector<Segment> & segments) {
    for (const Segment & segment : segments) {
        if (segment.kind == Segment::Kind::Scaffold) {
            parse(segment.text);
        }
    }
}

std::vector<Unit> PromptTokenizer::units(const std::vector<Segment> & segments) {
    std::vector<Unit> units;
    std::vector<Part> parts;
    for (const Segment & segment : segments) {
        if (segment.kind == Segment::Kind::User) {
            parts.push_back({ segment.text, -1 });
        } else if (segment.kind == Segment::Kind::Scaffold) {
            const auto & parsed = parse(segment.text);
            parts.insert(parts.end(), parsed.begin(), parsed.end());
        } else {
            add_run(parts, units);
            if (segment.kind == Segment::Kind::Image) {
                units.push_back({ {}, segment.text });
            }
            for (const llama_token token : segment.ids) {
                units.push_back({ { token }, "" });
            }
        }
    }
    add_run(parts, units);
    return units;
}

// One run of special tokens and the joined text between them, or nothing. A SentencePiece vocabulary would put a blank in
// front of each text that is tokenised by itself.
void PromptTokenizer::add_run(std::vector<Part> & parts, std::vector<Unit> & units) {
    Unit        unit;
    std::string text;
    bool        strip = false;
    const auto  flush = [&] {
        const auto ids = plain(text);
        unit.ids.insert(unit.ids.end(), ids.begin(), ids.end());
        text.clear();
    };
    for (const Part & part : parts) {
        if (part.token < 0) {
            const size_t from = strip && text.empty() ? std::min(part.text.find_first_not_of(BLANKS), part.text.size()) : 0;
            text += part.text.substr(from);
            continue;
        }
        flush();
        unit.ids.push_back(part.token);
        strip = engine_.strips_right(part.token);
    }
    flush();
    parts.clear();
    if (!unit.ids.empty()) {
        units.push_back(std::move(unit));
    }
}

void PromptTokenizer::stop_tokens(const std::vector<std::string> & stop, std::vector<llama_token> & ids,
                                  std::vector<std::string> & texts) {
    for (const std::string & text : stop) {
        const auto & parts = parse(text);
        if (parts.size() == 1 && parts[0].token >= 0) {
            ids.push_back(parts[0].token);
        } else {
            texts.push_back(text);
        }
    }
}

std::vector<llama_token> PromptTokenizer::plain(const std::string & text, int depth) {
    if (text.empty()) {
        return {};
    }
    const auto ids    = engine_.tokenize(text, false);
    const auto forged = std::find_if(ids.begin(), ids.end(), [&](llama_token t) { return is_structural(t); });
    if (forged == ids.end()) {
        return ids;
    }
    // The vocabulary makes a special token of its name even in plain text: cut the name in two.
    const std::string        name  = engine_.token_text(*forged);
    const size_t             first = name.empty() ? 0 : first_character(name);
    std::vector<llama_token> out;
    size_t                   begin = 0;
    for (size_t at = text.find(name); first < name.size() && at != std::string::npos; at = text.find(name, at + name.size())) {
        const auto some = plain(text.substr(begin, at + first - begin), depth + 1);
        out.insert(out.end(), some.begin(), some.end());
        begin = at + first;
    }
    if (begin == 0 || depth == MAX_CUTS) {
        fail(LLAVA_EDGE_INVALID_ARGUMENT, "the text can't be written without the special token %s", shown(name).c_str());
    }
    const auto rest = plain(text.substr(begin), depth + 1);
    out.insert(out.end(), rest.begin(), rest.end());
    return out;
}

const std::vector<PromptTokenizer::Part> & PromptTokenizer::parse(const std::string & scaffold) {
    const auto known = parsed_.find(scaffold);
    if (known != parsed_.end()) {
        return known->second;
    }
    std::vector<std::pair<std::string, llama_token>> names;
    for (const llama_token token : engine_.tokenize(scaffold, true)) {
        const std::string name    = engine_.token_text(token);
        const bool        special = engine_.is_control(token) || engine_.is_user_defined(token);
        // Blanks that are tokens of their own are text, which a person may write too.
        if (special && name.find_first_not_of(BLANKS) != std::string::npos && scaffold.find(name) != std::string::npos) {
            names.emplace_back(name, token);
            structural_[token] = true;
        }
    }
    std::stable_sort(names.begin(), names.end(), [](const auto & a, const auto & b) { return a.first.size() > b.first.size(); });
    std::vector<Part> parts;
    std::string       text;
    const auto        flush = [&] {
        if (!text.empty()) {
            parts.push_back({ text, -1 });
            text.clear();
        }
    };
    for (size_t at = 0; at < scaffold.size();) {
        const auto found = std::find_if(names.begin(), names.end(), [&](const auto & n) { return scaffold.compare(at, n.first.size(), n.first) == 0; });
        if (found == names.end()) {
            text += scaffold[at++];
            continue;
        }
        flush();
        parts.push_back({ "", found->second });
        at += found->first.size();
    }
    flush();
    return parsed_[scaffold] = parts;
}

bool PromptTokenizer::is_structural(llama_token token) {
    const auto known = structural_.find(token);
    if (known != structural_.end()) {
        return known->second;
    }
    return structural_[token] = engine_.is_control(token) || (engine_.is_user_defined(token) && is_marker(engine_.token_text(token)));
}

}  // namespace llava_edge
