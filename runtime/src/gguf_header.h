// The header of a GGUF file, read without trusting it: every length is checked against the file's size before it is
// used. The layout is that of the GGUF specification (docs/gguf.md in ggml).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace llava_edge {

enum GgufKind : uint32_t {
    GGUF_UINT16 = 2,
    GGUF_UINT32 = 4,
    GGUF_INT32 = 5,
    GGUF_FLOAT32 = 6,
    GGUF_BOOL = 7,
    GGUF_TEXT = 8,
    GGUF_ARRAY = 9,
};

// A value. Numbers are exact up to 2^53. Lists have the kind of their items in `items`.
struct GgufField {
    uint32_t                 kind = 0, items = 0;
    double                   number = 0;
    std::string              text;
    std::vector<double>      numbers;
    std::vector<std::string> texts;
};

// A tensor's entry. `shape` has the row's length first and ones up to four; `offset` counts from the file's start.
struct GgufTensor {
    std::array<uint64_t, 4> shape{ 1, 1, 1, 1 };
    uint32_t                type = 0;
    uint64_t                offset = 0, n_bytes = 0;
    bool                    is_vector() const { return shape[1] * shape[2] * shape[3] == 1; }
};

struct GgufHeader {
    std::string                       path;
    std::map<std::string, GgufField>  fields;
    std::map<std::string, GgufTensor> tensors;

    // Fail (MODEL_INVALID) over one field of this file.
    [[noreturn]] void wrong(const std::string & field, const std::string & problem) const;

    const GgufField *  find(const std::string & key) const;
    const GgufTensor * tensor(const std::string & name) const;

    // A text; empty if the key is missing or no text.
    std::string text(const std::string & key) const;
    // Whether a bool is there and true; fails over another type.
    bool flag(const std::string & key) const;
    // A uint32 within its range; `missing` if it is not there (fails if that is below 0).
    int64_t integer(const std::string & key, int64_t low, int64_t high, int64_t missing = -1) const;
    // A finite float32 within its range.
    double number(const std::string & key, double low, double high) const;
    // A list whose items have this kind; null if it is missing.
    const GgufField * list(const std::string & key, uint32_t items) const;
    // The shape of a tensor must be this one.
    const GgufTensor & check_shape(const std::string & name, std::array<uint64_t, 4> shape) const;
};

GgufHeader read_gguf_header(const std::string & path);

// What a language model's file must keep to, so that llama.cpp does not end the process over it.
void check_llm(const GgufHeader & header);

}  // namespace llava_edge
