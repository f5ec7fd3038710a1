// A strict JSON reader: every key is asked for by name and type, and a key that nobody asked for is an error.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace llava_edge {

struct Json {
    enum class Kind { Null, Bool, Integer, Number, Text, List, Object };

    Kind                                      kind    = Kind::Null;
    bool                                      boolean = false;
    int64_t                                   integer = 0;
    double                                    number  = 0;  // of integers too
    std::string                               text;
    std::vector<Json>                         list;
    std::vector<std::pair<std::string, Json>> members;
};

// Parse a document. Fails (MODEL_INVALID) on everything that RFC 8259 does not allow, on a key that stands twice, and on
// lists deeper than 64.
Json parse_json(std::string_view text);

// Whether the bytes are well-formed UTF-8 without zero bytes.
bool is_utf8(std::string_view text);

// A JSON object being read. `where` is the path to it in messages, empty at the root.
class Fields {
  public:
    Fields(const Json & value, std::string where);

    // Fail if a key is left that was not asked for.
    void finish() const;

    bool                 has(const char * key);
    bool                 is_null(const char * key);
    const std::string &  text(const char * key);
    int64_t              integer(const char * key, int64_t low, int64_t high);
    std::vector<int64_t> integers(const char * key, int64_t low, int64_t high);
    std::vector<std::vector<int64_t>> integer_lists(const char * key, int64_t low, int64_t high);
    std::vector<double>  numbers(const char * key, size_t length);
    std::vector<std::string> texts(const char * key);
    Fields               object(const char * key);
    std::vector<Fields>  objects(const char * key);

    [[noreturn]] void wrong(const char * key, const std::string & problem) const;

  private:
    const Json &         get(const char * key, Json::Kind kind, const char * words);
    std::vector<int64_t> whole_numbers(const char * key, const Json & list, int64_t low, int64_t high) const;

    const Json &          value_;
    std::string           where_;
    std::set<std::string> asked_;
};

}  // namespace llava_edge
