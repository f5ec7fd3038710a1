// The preflight of a language model's file. llama.cpp answers a wrong shape of a tensor with an error, but ends the
// process over hyper-parameters and vocabularies that don't fit together; those are checked here.

#include <algorithm>
#include <set>

#include "error.h"
#include "gguf_header.h"

namespace llava_edge {

namespace {

constexpr int64_t MAX_LAYERS = 512, MAX_WIDTH = 1 << 20;
// Architectures whose files were mutated by the hundred thousand without harm; see tests/fuzz.
const std::set<std::string> CHECKED = { "llama", "qwen2" };

// One number for all layers, or a list with one for each; empty if the key is missing.
std::vector<int64_t> per_layer(const GgufHeader & header, const std::string & key, int64_t layers, int64_t high) {
    const GgufField * field = header.find(key);
    if (field == nullptr) {
        return {};
    }
    if (field->kind != GGUF_ARRAY) {
        return std::vector<int64_t>(static_cast<size_t>(layers), header.integer(key, 0, high));
    }
    if ((field->items != GGUF_UINT32 && field->items != GGUF_INT32) || field->numbers.size() != static_cast<size_t>(layers)) {
        header.wrong(key, format("is not a list of %lld whole numbers", (long long) layers));
    }
    std::vector<int64_t> values;
    for (const double value : field->numbers) {
        if (value < 0 || value > static_cast<double>(high)) {
            header.wrong(key, "holds a value out of range");
        }
        values.push_back(static_cast<int64_t>(value));
    }
    return values;
}

void check_heads(const GgufHeader & header, const std::string & arch, int64_t layers, int64_t width) {
    const auto heads    = per_layer(header, arch + ".attention.head_count", layers, 4096);
    auto       kv_heads = per_layer(header, arch + ".attention.head_count_kv", layers, 4096);
    kv_heads            = kv_heads.empty() ? heads : kv_heads;
    if (heads.empty() || heads[0] == 0) {
        header.wrong(arch + ".attention.head_count", "is missing");
    }
    // llama.cpp takes the first layer's numbers for all of these models' layers, and its cache each layer's own.
    if (std::any_of(heads.begin(), heads.end(), [&](int64_t count) { return count != heads[0]; })) {
        header.wrong(arch + ".attention.head_count", "differs from layer to layer");
    }
    if (kv_heads[0] == 0 || heads[0] % kv_heads[0] != 0 ||
        std::any_of(kv_heads.begin(), kv_heads.end(), [&](int64_t count) { return count != kv_heads[0]; })) {
        header.wrong(arch + ".attention.head_count_kv", "is no divisor of the heads, or differs from layer to layer");
    }
    const int64_t per_head = width / heads[0];
    const int64_t key      = header.integer(arch + ".attention.key_length", 1, 8192, per_head);
    const int64_t value    = header.integer(arch + ".attention.value_length", 1, 8192, per_head);
    const int64_t rotated  = header.integer(arch + ".rope.dimension_count", 1, 8192, key);
    if (key != value || key != rotated || key % 2 != 0) {
        header.wrong(arch + ".attention.key_length", "differs from value_length or rope.dimension_count, or is odd");
    }
    if (arch == "qwen2" && key * heads[0] != width) {
        header.wrong(arch + ".attention.key_length", "times the heads is not the width");
    }
}

void check_rope(const GgufHeader & header, const std::string & arch) {
    if (header.find(arch + ".rope.freq_base") != nullptr) {
        header.number(arch + ".rope.freq_base", 1e-3, 1e15);
    }
    for (const char * name : { ".rope.scaling.factor", ".rope.scale_linear" }) {
        if (header.find(arch + name) != nullptr) {
            header.number(arch + name, 0, 1e6);
        }
    }
    const std::string           key   = arch + ".rope.scaling.type";
    const std::set<std::string> kinds = { "none", "linear", "yarn", "longrope" };
    if (header.find(key) != nullptr && kinds.count(header.text(key)) == 0) {
        header.wrong(key, "is " + shown(header.text(key)));
    }
}

bool is_byte_name(const std::string & text) {
    return text.size() == 6 && text.compare(0, 3, "<0x") == 0 && text[5] == '>' &&
           text.find_first_not_of("0123456789ABCDEFabcdef", 3) == 5;
}

void check_bytes(const GgufHeader & header, const std::vector<std::string> & tokens, const std::set<std::string> & known) {
    const std::string key   = "tokenizer.ggml.tokens";
    const GgufField * types = header.list("tokenizer.ggml.token_type", GGUF_INT32);
    for (size_t i = 0; types != nullptr && i < tokens.size(); i++) {
        if (types->numbers[i] == 6 && !is_byte_name(tokens[i])) {
            header.wrong(key, "marks " + shown(tokens[i]) + " as a byte; expected the form <0x0A>");
        }
    }
    if (header.text("tokenizer.ggml.model") != "llama") {
        return;
    }
    for (int byte = 0; byte < 256; byte++) {
        if (known.count(format("<0x%02X>", byte)) == 0 && known.count(std::string(1, static_cast<char>(byte))) == 0) {
            header.wrong(key, format("has no token for the byte %d", byte));
        }
    }
}

void check_vocabulary(const GgufHeader & header) {
    const std::string model = header.text("tokenizer.ggml.model");
    if (model != "llama" && model != "gpt2" && model != "gemma4") {
        header.wrong("tokenizer.ggml.model", "is " + shown(model) + "; expected llama, gpt2 or gemma4");
    }
    const std::string key    = "tokenizer.ggml.tokens";
    const GgufField * listed = header.list(key, GGUF_TEXT);
    if (listed == nullptr || listed->texts.empty()) {
        header.wrong(key, "is missing or empty");
    }
    const std::set<std::string> known(listed->texts.begin(), listed->texts.end());
    if (known.size() != listed->texts.size() || known.count("") != 0) {
        header.wrong(key, "holds a token twice, or an empty text");
    }
    // llama.cpp reads up to a zero byte, so that two tokens could be one.
    if (std::any_of(known.begin(), known.end(), [](const std::string & token) { return token.find('\0') != std::string::npos; })) {
        header.wrong(key, "holds a text with a zero byte");
    }
    for (const char * name : { "tokenizer.ggml.token_type", "tokenizer.ggml.scores" }) {
        const GgufField * field = header.find(name);
        const bool        right = field == nullptr || (field->kind == GGUF_ARRAY && field->numbers.size() == listed->texts.size() &&
                                                (field->items == GGUF_INT32 || field->items == GGUF_FLOAT32));
        if (!right) {
            header.wrong(name, "has not one number for each token");
        }
    }
    check_bytes(header, listed->texts, known);
    if (model != "llama") {
        header.list("tokenizer.ggml.merges", GGUF_TEXT);
    }
}

}  // namespace

void check_llm(const GgufHeader & header) {
    const std::string arch = header.text("general.architecture");
    if (arch == "clip" || arch.empty()) {
        header.wrong("general.architecture", "is " + shown(arch) + "; this file is to be a language model");
    }
    if (CHECKED.count(arch) == 0) {
        fail(LLAVA_EDGE_MODEL_UNSUPPORTED, "%s is a language model of kind %s; this library runs llama and qwen2",
             header.path.c_str(), shown(arch).c_str());
    }
    for (const auto & [name, tensor] : header.tensors) {
        if (tensor.is_vector() && tensor.type != 0) {
            header.wrong("tensor " + name, "is a vector, but not of float32");
        }
    }
    if (const GgufField * splits = header.find("split.count"); splits != nullptr && splits->number > 1) {
        fail(LLAVA_EDGE_MODEL_UNSUPPORTED, "%s is one of several parts; merge them first (llama-gguf-split --merge)", header.path.c_str());
    }
    const int64_t layers = header.integer(arch + ".block_count", 1, MAX_LAYERS);
    const int64_t width  = header.integer(arch + ".embedding_length", 1, MAX_WIDTH);
    header.integer(arch + ".context_length", 1, 1 << 27);
    header.integer(arch + ".nextn_predict_layers", 0, layers - 1, 0);
    if (header.integer(arch + ".expert_count", 0, 512, 0) != 0) {
        fail(LLAVA_EDGE_MODEL_UNSUPPORTED, "%s is a mixture of experts, which this library does not run", header.path.c_str());
    }
    per_layer(header, arch + ".expert_used_count", layers, 0);
    header.integer(arch + ".expert_group_count", 0, 0, 0);
    header.integer(arch + ".expert_group_used_count", 0, 0, 0);
    per_layer(header, arch + ".feed_forward_length", layers, MAX_WIDTH);
    check_heads(header, arch, layers, width);
    check_rope(header, arch);
    for (const char * name : { ".attention.layer_norm_rms_epsilon", ".attention.layer_norm_epsilon" }) {
        if (header.find(arch + name) != nullptr) {
            header.number(arch + name, 0, 1);
        }
    }
    check_vocabulary(header);
}

}  // namespace llava_edge
