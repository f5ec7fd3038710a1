#include "gguf_header.h"

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

#include "bundle.h"
#include "error.h"

namespace llava_edge {

namespace {

constexpr uint64_t MAX_HEADER_BYTES = 256ull << 20;
constexpr uint64_t MAX_KEYS         = 4096;
constexpr uint64_t MAX_TENSORS      = 65536;
constexpr uint64_t MAX_NAME_BYTES   = 63;
constexpr uint64_t MAX_KEY_BYTES    = 255;
constexpr uint64_t MAX_TEXT_BYTES   = 16ull << 20;
constexpr uint64_t MAX_ITEMS        = 1ull << 22;
constexpr uint64_t MIN_ALIGNMENT = 32, MAX_ALIGNMENT = 1 << 20;

struct TypeOfWeights {
    uint32_t number;
    uint64_t block, block_bytes;
};

// ggml's types of weights. Those that only exist while computing, or that no layer takes, are left out and so refused.
constexpr TypeOfWeights TYPES[] = {
    { 0, 1, 4 },      { 1, 1, 2 },      { 2, 32, 18 },    { 3, 32, 20 },    { 6, 32, 22 },   { 7, 32, 24 },
    { 8, 32, 34 },    { 10, 256, 84 },  { 11, 256, 110 }, { 12, 256, 144 }, { 13, 256, 176 }, { 14, 256, 210 },
    { 16, 256, 66 },  { 17, 256, 74 },  { 18, 256, 98 },  { 19, 256, 50 },  { 20, 32, 18 },  { 21, 256, 110 },
    { 22, 256, 82 },  { 23, 256, 136 }, { 29, 256, 56 },  { 30, 1, 2 },     { 34, 256, 54 }, { 35, 256, 66 },
    { 39, 32, 17 },   { 40, 64, 36 },   { 41, 128, 18 },
};

uint64_t scalar_size(uint32_t kind) {
    static const uint64_t sizes[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    return kind < 13 ? sizes[kind] : 0;
}

// Goes through the file once. `field_` is what is being read, for messages.
class Parser {
  public:
    explicit Parser(const std::string & path) : size_(file_size(path)), file_(std::fopen(path.c_str(), "rb"), std::fclose) {
        header_.path = path;
        if (!file_) {
            fail(LLAVA_EDGE_IO, "can't read %s: %s", path.c_str(), system_text(errno).c_str());
        }
    }

    GgufHeader parse() {
        if (bytes(4) != "GGUF") {
            wrong("is another; this is not a GGUF file");
        }
        field_             = "version";
        const auto version = value<uint32_t>();
        if (version != 2 && version != 3) {
            wrong(format("is %u; expected 2 or 3", version));
        }
        const uint64_t n_tensors = count("tensor count", MAX_TENSORS), n_keys = count("key count", MAX_KEYS);
        for (uint64_t i = 0; i < n_keys; i++) {
            field_                = format("key %llu", (unsigned long long) i);
            const std::string key = name(MAX_KEY_BYTES);
            field_                = key;
            if (header_.fields.count(key) != 0) {
                wrong("stands twice");
            }
            read_field(header_.fields[key]);
        }
        read_tensors(n_tensors);
        return std::move(header_);
    }

  private:
    [[noreturn]] void wrong(const std::string & problem) const { header_.wrong(field_, problem); }

    void need(uint64_t n) const {
        if (n > size_ || at_ > size_ - n) {
            wrong(format("needs %llu bytes at byte %llu; the file ends at %llu", (unsigned long long) n,
                         (unsigned long long) at_, (unsigned long long) size_));
        }
        if (at_ + n > MAX_HEADER_BYTES) {
            wrong("makes the header too long");
        }
    }

    void read(void * to, uint64_t n) {
        need(n);
        if (n != 0 && std::fread(to, 1, n, file_.get()) != n) {
            fail(LLAVA_EDGE_IO, "can't read %s", header_.path.c_str());
        }
        at_ += n;
    }

    template <typename T> T value() {
        T found;
        read(&found, sizeof found);
        return found;
    }

    std::string bytes(uint64_t n) {
        need(n);
        std::string found(n, '\0');
        read(found.data(), n);
        return found;
    }

    std::string text(uint64_t limit) {
        const auto n = value<uint64_t>();
        if (n > limit) {
            wrong(format("has a text of %llu bytes; at most %llu are allowed", (unsigned long long) n, (unsigned long long) limit));
        }
        return bytes(n);
    }

    std::string name(uint64_t limit) {
        std::string found = text(limit);
        bool        plain = !found.empty();
        for (const char c : found) {
            plain = plain && c >= ' ' && c <= '~';
        }
        if (!plain) {
            wrong("is named " + shown(found) + "; expected printable ASCII");
        }
        return found;
    }

    uint64_t count(const char * field, uint64_t limit) {
        field_       = field;
        const auto n = value<uint64_t>();
        if (n > limit) {
            wrong(format("is %llu; at most %llu are allowed", (unsigned long long) n, (unsigned long long) limit));
        }
        return n;
    }

    double scalar(uint32_t kind) {
        switch (kind) {
            case 0:
            case 7:
                return value<uint8_t>();
            case 1:
                return value<int8_t>();
            case 2:
                return value<uint16_t>();
            case 3:
                return value<int16_t>();
            case 4:
                return value<uint32_t>();
            case 5:
                return value<int32_t>();
            case 6:
                return static_cast<double>(value<float>());
            case 10:
                return static_cast<double>(value<uint64_t>());
            case 11:
                return static_cast<double>(value<int64_t>());
            case 12:
                return value<double>();
            default:
                wrong(format("has the type %u, which does not exist", kind));
        }
    }

    void read_field(GgufField & field) {
        field.kind = value<uint32_t>();
        if (field.kind == GGUF_TEXT) {
            field.text = text(MAX_TEXT_BYTES);
        } else if (field.kind == GGUF_ARRAY) {
            read_list(field);
        } else {
            field.number = scalar(field.kind);
        }
    }

    void read_list(GgufField & field) {
        field.items  = value<uint32_t>();
        const auto n = value<uint64_t>();
        if (n > MAX_ITEMS) {
            wrong(format("is a list of %llu values; at most %llu are allowed", (unsigned long long) n, (unsigned long long) MAX_ITEMS));
        }
        if (field.items == GGUF_TEXT) {
            need(n * 8);
            for (uint64_t i = 0; i < n; i++) {
                field.texts.push_back(text(MAX_TEXT_BYTES));
            }
            return;
        }
        if (scalar_size(field.items) == 0) {
            wrong(format("is a list of type %u; lists of numbers, bools and texts are allowed", field.items));
        }
        need(n * scalar_size(field.items));
        for (uint64_t i = 0; i < n; i++) {
            field.numbers.push_back(scalar(field.items));
        }
    }

    uint64_t alignment() {
        field_ = "general.alignment";
        return static_cast<uint64_t>(header_.integer(field_, MIN_ALIGNMENT, MAX_ALIGNMENT, MIN_ALIGNMENT));
    }

    void read_tensors(uint64_t n) {
        const uint64_t step = alignment();
        if ((step & (step - 1)) != 0) {
            wrong(format("is %llu; expected a power of two", (unsigned long long) step));
        }
        uint64_t expected = 0;
        for (uint64_t i = 0; i < n; i++) {
            field_                = format("tensor %llu", (unsigned long long) i);
            const std::string key = name(MAX_NAME_BYTES);
            field_                = "tensor " + key;
            GgufTensor tensor     = read_tensor(expected);
            if (!header_.tensors.emplace(key, tensor).second) {
                wrong("stands twice");
            }
            expected += (tensor.n_bytes + step - 1) / step * step;
        }
        const uint64_t start = (at_ + step - 1) / step * step;
        for (auto & [key, tensor] : header_.tensors) {
            field_ = "tensor " + key;
            tensor.offset += start;
            if (tensor.offset + tensor.n_bytes > size_) {
                wrong(format("ends at byte %llu; the file has %llu", (unsigned long long) (tensor.offset + tensor.n_bytes),
                             (unsigned long long) size_));
            }
        }
    }

    GgufTensor read_tensor(uint64_t expected) {
        GgufTensor tensor;
        const auto n_dims = value<uint32_t>();
        if (n_dims < 1 || n_dims > 4) {
            wrong(format("has %u dimensions; expected 1 to 4", n_dims));
        }
        for (uint32_t i = 0; i < n_dims; i++) {
            tensor.shape[i] = value<uint64_t>();
        }
        tensor.type   = value<uint32_t>();
        tensor.offset = value<uint64_t>();
        const TypeOfWeights * type = nullptr;
        for (const TypeOfWeights & known : TYPES) {
            type = known.number == tensor.type ? &known : type;
        }
        if (type == nullptr) {
            wrong(format("has the type %u, which is no type of weights", tensor.type));
        }
        if (tensor.shape[0] % type->block != 0) {
            wrong(format("has rows of %llu values; its type packs %llu together", (unsigned long long) tensor.shape[0],
                         (unsigned long long) type->block));
        }
        // No product is larger than the file's size times one length, which was compared with that size before.
        tensor.n_bytes = tensor.shape[0] / type->block > size_ ? size_ + 1 : tensor.shape[0] / type->block * type->block_bytes;
        for (uint32_t i = 0; i < 4; i++) {
            if (tensor.shape[i] < 1) {
                wrong("has a length of 0");
            }
            if (i > 0) {
                tensor.n_bytes = tensor.shape[i] > size_ / tensor.n_bytes ? size_ + 1 : tensor.n_bytes * tensor.shape[i];
            }
            if (tensor.n_bytes > size_) {
                wrong(format("is larger than the file, which has %llu bytes", (unsigned long long) size_));
            }
        }
        if (tensor.offset != expected) {
            wrong(format("has the offset %llu; expected %llu, right after the tensor before",
                         (unsigned long long) tensor.offset, (unsigned long long) expected));
        }
        return tensor;
    }

    uint64_t                                   size_;
    std::unique_ptr<FILE, int (*)(FILE *)>     file_;
    uint64_t                                   at_    = 0;
    std::string                                field_ = "magic";
    GgufHeader                                 header_;
};

}  // namespace

void GgufHeader::wrong(const std::string & field, const std::string & problem) const {
    fail(LLAVA_EDGE_MODEL_INVALID, "%s: %s %s", path.c_str(), field.c_str(), problem.c_str());
}

const GgufField * GgufHeader::find(const std::string & key) const {
    const auto found = fields.find(key);
    return found == fields.end() ? nullptr : &found->second;
}

const GgufTensor * GgufHeader::tensor(const std::string & name) const {
    const auto found = tensors.find(name);
    return found == tensors.end() ? nullptr : &found->second;
}

std::string GgufHeader::text(const std::string & key) const {
    const GgufField * field = find(key);
    return field != nullptr && field->kind == GGUF_TEXT ? field->text : "";
}

bool GgufHeader::flag(const std::string & key) const {
    const GgufField * field = find(key);
    if (field != nullptr && field->kind != GGUF_BOOL) {
        wrong(key, "is no bool");
    }
    return field != nullptr && field->number != 0;
}

int64_t GgufHeader::integer(const std::string & key, int64_t low, int64_t high, int64_t missing) const {
    const GgufField * field = find(key);
    if (field == nullptr) {
        if (missing < 0) {
            wrong(key, "is missing");
        }
        return missing;
    }
    if (field->kind != GGUF_UINT32) {
        wrong(key, "is of another type than uint32");
    }
    const auto value = static_cast<int64_t>(field->number);
    if (value < low || value > high) {
        wrong(key, format("is %lld; expected %lld to %lld", (long long) value, (long long) low, (long long) high));
    }
    return value;
}

double GgufHeader::number(const std::string & key, double low, double high) const {
    const GgufField * field = find(key);
    if (field == nullptr || field->kind != GGUF_FLOAT32) {
        wrong(key, "is no float32");
    }
    if (!std::isfinite(field->number) || field->number < low || field->number > high) {
        wrong(key, format("is %g; expected %g to %g", field->number, low, high));
    }
    return field->number;
}

const GgufField * GgufHeader::list(const std::string & key, uint32_t items) const {
    const GgufField * field = find(key);
    if (field != nullptr && (field->kind != GGUF_ARRAY || field->items != items)) {
        wrong(key, "is no list of the expected type");
    }
    return field;
}

const GgufTensor & GgufHeader::check_shape(const std::string & name, std::array<uint64_t, 4> shape) const {
    const GgufTensor * found = tensor(name);
    if (found == nullptr) {
        wrong("tensor " + name, "is missing");
    }
    if (found->shape != shape) {
        const auto s = found->shape;
        wrong("tensor " + name,
              format("has the shape %llu, %llu, %llu, %llu; expected %llu, %llu, %llu, %llu", (unsigned long long) s[0],
                     (unsigned long long) s[1], (unsigned long long) s[2], (unsigned long long) s[3],
                     (unsigned long long) shape[0], (unsigned long long) shape[1], (unsigned long long) shape[2],
                     (unsigned long long) shape[3]));
    }
    return *found;
}

GgufHeader read_gguf_header(const std::string & path) {
    return Parser(path).parse();
}

}  // namespace llava_edge
