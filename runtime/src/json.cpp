#include "json.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <locale>
#include <sstream>

#include "error.h"

namespace llava_edge {

namespace {

constexpr int MAX_DEPTH = 64;

class Parser {
  public:
    explicit Parser(std::string_view text) : text_(text) {}

    Json document() {
        Json value = parse(0);
        blanks();
        if (at_ != text_.size()) {
            wrong("something follows the end");
        }
        return value;
    }

  private:
    [[noreturn]] void wrong(const char * problem) const {
        fail(LLAVA_EDGE_MODEL_INVALID, "not JSON at byte %zu: %s", at_, problem);
    }

    void blanks() {
        while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) {
            at_++;
        }
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    bool take(char c) {
        if (peek() != c || at_ >= text_.size()) {
            return false;
        }
        at_++;
        return true;
    }

    bool take(std::string_view word) {
        if (text_.substr(at_, word.size()) != word) {
            return false;
        }
        at_ += word.size();
        return true;
    }

    Json parse(int depth) {
        if (depth > MAX_DEPTH) {
            wrong("too many levels");
        }
        blanks();
        Json value;
        if (take('{')) {
            object(value, depth);
        } else if (take('[')) {
            list(value, depth);
        } else if (peek() == '"') {
            value.kind = Json::Kind::Text;
            value.text = string();
        } else if (take("true")) {
            value.kind    = Json::Kind::Bool;
            value.boolean = true;
        } else if (take("false")) {
            value.kind = Json::Kind::Bool;
        } else if (!take("null")) {
            number(value);
        }
        return value;
    }

    void object(Json & value, int depth) {
        value.kind = Json::Kind::Object;
        std::set<std::string> known;
        blanks();
        if (take('}')) {
            return;
        }
        do {
            blanks();
            std::string key = string();
            if (!known.insert(key).second) {
                wrong("a key stands twice");
            }
            blanks();
            if (!take(':')) {
                wrong("expected ':'");
            }
            value.members.emplace_back(std::move(key), parse(depth + 1));
            blanks();
        } while (take(','));
        if (!take('}')) {
            wrong("expected ',' or '}'");
        }
    }

    void list(Json & value, int depth) {
        value.kind = Json::Kind::List;
        blanks();
        if (take(']')) {
            return;
        }
        do {
            value.list.push_back(parse(depth + 1));
            blanks();
        } while (take(','));
        if (!take(']')) {
            wrong("expected ',' or ']'");
        }
    }

    size_t digits() {
        const size_t start = at_;
        while (peek() >= '0' && peek() <= '9') {
            at_++;
        }
        if (at_ == start) {
            wrong("expected a value");
        }
        return at_ - start;
    }

    // strtod would expect the decimal comma of the program's locale.
    static double to_double(const std::string & raw) {
        std::istringstream in(raw);
        in.imbue(std::locale::classic());
        double value = 0;
        in >> value;
        const bool too_large = in.fail() && std::fabs(value) > 1;
        return too_large ? std::copysign(std::numeric_limits<double>::infinity(), value) : value;
    }

    void number(Json & value) {
        const size_t start = at_;
        take('-');
        const bool zero  = peek() == '0';
        bool       whole = true;
        if (digits() > 1 && zero) {
            wrong("a number begins with 0");
        }
        if (take('.')) {
            whole = false;
            digits();
        }
        if (take('e') || take('E')) {
            whole = false;
            if (!take('+')) {
                take('-');
            }
            digits();
        }
        const std::string raw(text_.substr(start, at_ - start));
        value.number = to_double(raw);
        value.kind   = Json::Kind::Number;
        if (whole && std::fabs(value.number) < 9e18) {
            value.kind    = Json::Kind::Integer;
            value.integer = std::strtoll(raw.c_str(), nullptr, 10);
        }
    }

    std::string string() {
        if (!take('"')) {
            wrong("expected a text");
        }
        std::string out;
        while (true) {
            if (at_ >= text_.size()) {
                wrong("a text does not end");
            }
            const char c = text_[at_++];
            if (c == '"') {
                return out;
            }
            if (static_cast<unsigned char>(c) < 0x20) {
                wrong("a control character in a text");
            }
            if (c == '\\') {
                escape(out);
            } else {
                out += c;
            }
        }
    }

    void escape(std::string & out) {
        static const std::string_view names = "\"\\/bfnrt", values = "\"\\/\b\f\n\r\t";
        const char                    c     = peek();
        at_++;
        const size_t found = names.find(c);
        if (found != std::string_view::npos) {
            out += values[found];
            return;
        }
        if (c != 'u') {
            wrong("an unknown escape");
        }
        uint32_t code = hex4();
        if (code >= 0xD800 && code < 0xDC00 && take("\\u")) {
            const uint32_t low = hex4();
            if (low < 0xDC00 || low > 0xDFFF) {
                wrong("half a pair of surrogates");
            }
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        if (code == 0 || (code >= 0xD800 && code < 0xE000)) {
            wrong("a character that is not allowed");
        }
        append(out, code);
    }

    uint32_t hex4() {
        uint32_t code = 0;
        for (int i = 0; i < 4; i++, at_++) {
            const char c = peek();
            const int  d = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
            if (d < 0) {
                wrong("expected four hexadecimal digits");
            }
            code = code * 16 + static_cast<uint32_t>(d);
        }
        return code;
    }

    static void append(std::string & out, uint32_t code) {
        if (code < 0x80) {
            out += static_cast<char>(code);
            return;
        }
        const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
        out += static_cast<char>((more == 1 ? 0xC0u : more == 2 ? 0xE0u : 0xF0u) | (code >> (6 * more)));
        for (int i = more - 1; i >= 0; i--) {
            out += static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3F));
        }
    }

    std::string_view text_;
    size_t           at_ = 0;
};

}  // namespace

Json parse_json(std::string_view text) {
    if (!is_utf8(text)) {
        fail(LLAVA_EDGE_MODEL_INVALID, "not JSON: the text is not UTF-8");
    }
    return Parser(text).document();
}

bool is_utf8(std::string_view text) {
    for (size_t i = 0; i < text.size();) {
        const auto lead = static_cast<unsigned char>(text[i]);
        const int  more = lead < 0x80 ? 0 : lead < 0xC2 ? -1 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : lead < 0xF5 ? 3 : -1;
        if (lead == 0 || more < 0 || i + static_cast<size_t>(more) >= text.size()) {
            return false;
        }
        for (int k = 1; k <= more; k++) {
            const auto next = static_cast<unsigned char>(text[i + static_cast<size_t>(k)]);
            const int  low  = k > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
            const int  high = k > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
            if (next < low || next > high) {
                return false;
            }
        }
        i += static_cast<size_t>(more) + 1;
    }
    return true;
}

Fields::Fields(const Json & value, std::string where) : value_(value), where_(std::move(where)) {
    if (value.kind != Json::Kind::Object) {
        fail(LLAVA_EDGE_MODEL_INVALID, "%s is no object", where_.empty() ? "the document" : where_.c_str());
    }
}

void Fields::finish() const {
    for (const auto & [key, value] : value_.members) {
        if (asked_.count(key) == 0) {
            wrong(shown(key).c_str(), "is unknown");
        }
    }
}

void Fields::wrong(const char * key, const std::string & problem) const {
    fail(LLAVA_EDGE_MODEL_INVALID, "%s%s%s %s", where_.c_str(), where_.empty() ? "" : ".", key, problem.c_str());
}

bool Fields::has(const char * key) {
    asked_.insert(key);
    for (const auto & [name, value] : value_.members) {
        if (name == key) {
            return true;
        }
    }
    return false;
}

bool Fields::is_null(const char * key) {
    asked_.insert(key);
    for (const auto & [name, value] : value_.members) {
        if (name == key) {
            return value.kind == Json::Kind::Null;
        }
    }
    wrong(key, "is missing");
}

const Json & Fields::get(const char * key, Json::Kind kind, const char * words) {
    asked_.insert(key);
    for (const auto & [name, value] : value_.members) {
        if (name == key) {
            if (value.kind != kind) {
                wrong(key, std::string("is not ") + words);
            }
            return value;
        }
    }
    wrong(key, "is missing");
}

const std::string & Fields::text(const char * key) {
    return get(key, Json::Kind::Text, "a text").text;
}

int64_t Fields::integer(const char * key, int64_t low, int64_t high) {
    const int64_t value = get(key, Json::Kind::Integer, "a whole number").integer;
    if (value < low || value > high) {
        wrong(key, format("is %lld; expected %lld to %lld", (long long) value, (long long) low, (long long) high));
    }
    return value;
}

std::vector<int64_t> Fields::whole_numbers(const char * key, const Json & list, int64_t low, int64_t high) const {
    std::vector<int64_t> values;
    for (const Json & item : list.list) {
        if (item.kind != Json::Kind::Integer || item.integer < low || item.integer > high) {
            wrong(key, format("holds something else than whole numbers from %lld to %lld", (long long) low, (long long) high));
        }
        values.push_back(item.integer);
    }
    return values;
}

std::vector<int64_t> Fields::integers(const char * key, int64_t low, int64_t high) {
    return whole_numbers(key, get(key, Json::Kind::List, "a list"), low, high);
}

std::vector<std::vector<int64_t>> Fields::integer_lists(const char * key, int64_t low, int64_t high) {
    std::vector<std::vector<int64_t>> lists;
    for (const Json & item : get(key, Json::Kind::List, "a list").list) {
        if (item.kind != Json::Kind::List) {
            wrong(key, "holds something else than lists");
        }
        lists.push_back(whole_numbers(key, item, low, high));
    }
    return lists;
}

std::vector<double> Fields::numbers(const char * key, size_t length) {
    std::vector<double> values;
    for (const Json & item : get(key, Json::Kind::List, "a list").list) {
        if ((item.kind != Json::Kind::Integer && item.kind != Json::Kind::Number) || !std::isfinite(item.number)) {
            wrong(key, "holds something else than finite numbers");
        }
        values.push_back(item.number);
    }
    if (values.size() != length) {
        wrong(key, format("has %zu numbers; expected %zu", values.size(), length));
    }
    return values;
}

std::vector<std::string> Fields::texts(const char * key) {
    std::vector<std::string> values;
    for (const Json & item : get(key, Json::Kind::List, "a list").list) {
        if (item.kind != Json::Kind::Text) {
            wrong(key, "holds something else than texts");
        }
        values.push_back(item.text);
    }
    return values;
}

Fields Fields::object(const char * key) {
    return Fields(get(key, Json::Kind::Object, "an object"), where_.empty() ? key : where_ + "." + key);
}

std::vector<Fields> Fields::objects(const char * key) {
    std::vector<Fields> found;
    for (const Json & item : get(key, Json::Kind::List, "a list").list) {
        found.emplace_back(item, format("%s[%zu]", key, found.size()));
    }
    return found;
}

}  // namespace llava_edge
