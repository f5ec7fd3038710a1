#include "tower_file.h"

#include <algorithm>
#include <set>

#include "error.h"

namespace llava_edge {

namespace {

constexpr int MAX_PATCHES = 4096;
constexpr int MAX_LAYERS  = 16;
// Scores of one block's attention, which are in memory at once: 16 heads on the most patches and a class token.
constexpr int64_t MAX_SCORES = (1 << 28) + (1 << 20);
// The widest of what passes through the tower, which is in memory at once.
constexpr int64_t MAX_NUMBERS = 1 << 27;
// F32, F16, Q4_0 to Q8_0, the K types, IQ4_NL, IQ4_XS, BF16
const std::set<uint32_t> MATRIX_TYPES = { 0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 30 };

const std::string VISION = "clip.vision.";

int key(const GgufHeader & h, const char * name, int64_t low, int64_t high) {
    return static_cast<int>(h.integer(VISION + name, low, high));
}

void check_types(const GgufHeader & h) {
    for (const auto & [name, tensor] : h.tensors) {
        if (tensor.is_vector() ? tensor.type != 0 : MATRIX_TYPES.count(tensor.type) == 0) {
            h.wrong("tensor " + name, format("is of type %u, which is not expected of its shape", tensor.type));
        }
    }
}

void check_vector(const GgufHeader & h, const std::string & name, int length) {
    h.check_shape(name, { static_cast<uint64_t>(length), 1, 1, 1 });
}

void check_norm(const GgufHeader & h, const std::string & name, int width) {
    check_vector(h, name + ".weight", width);
    check_vector(h, name + ".bias", width);
}

void check_linear(const GgufHeader & h, const std::string & name, int in, int out) {
    h.check_shape(name + ".weight", { static_cast<uint64_t>(in), static_cast<uint64_t>(out), 1, 1 });
    if (h.tensor(name + ".bias") != nullptr) {
        check_vector(h, name + ".bias", out);
    }
}

void read_numbers(const GgufHeader & h, const char * name, double low, float * to) {
    const GgufField * field = h.list(VISION + name, GGUF_FLOAT32);
    if (field == nullptr || field->numbers.size() != 3 ||
        !std::all_of(field->numbers.begin(), field->numbers.end(), [&](double v) { return v >= low && v <= 10; })) {
        h.wrong(VISION + name, "is not three numbers in range");
    }
    std::copy(field->numbers.begin(), field->numbers.end(), to);
}

void read_features(const GgufHeader & h, TowerShape & shape) {
    const std::string name  = VISION + "feature_layer";
    const GgufField * field = h.list(name, GGUF_INT32);
    if (field == nullptr || field->numbers.empty()) {
        fail(LLAVA_EDGE_MODEL_UNSUPPORTED, "%s: %s is missing: nothing tells which layer's features are meant",
             h.path.c_str(), name.c_str());
    }
    std::set<int> layers;
    for (const double layer : field->numbers) {
        if (layer < 0 || layer > shape.blocks) {
            h.wrong(name, format("holds %g; expected layers from 0 to %d", layer, shape.blocks));
        }
        layers.insert(static_cast<int>(layer));
    }
    shape.features.assign(layers.begin(), layers.end());
}

void check_blocks(const GgufHeader & h, const TowerShape & shape) {
    for (int n = 0; n < shape.features.back(); n++) {
        const std::string block = format("v.blk.%d", n);
        for (const char * name : { ".attn_q", ".attn_k", ".attn_v", ".attn_out" }) {
            check_linear(h, block + name, shape.width, shape.width);
        }
        check_norm(h, block + ".ln1", shape.width);
        check_norm(h, block + ".ln2", shape.width);
        check_linear(h, block + ".ffn_up", shape.width, shape.feed_forward);
        check_linear(h, block + ".ffn_down", shape.feed_forward, shape.width);
        for (const char * name : { ".ls1", ".ls2", ".attn_q_norm", ".attn_k_norm", ".ffn_gate" }) {
            if (h.tensor(block + name + std::string(".weight")) != nullptr) {
                fail(LLAVA_EDGE_MODEL_UNSUPPORTED, "%s: tensor %s%s.weight has no place in this tower", h.path.c_str(),
                     block.c_str(), name);
            }
        }
    }
}

void check_projector(const GgufHeader & h, TowerShape & shape) {
    shape.norms = h.tensor("mm.3.weight") != nullptr;
    shape.projector.push_back(shape.width * static_cast<int>(shape.features.size()));
    for (size_t layer = 0;; layer++) {
        const std::string  name   = projector_name(shape, layer);
        const GgufTensor * weight = h.tensor(name + ".weight");
        if (weight == nullptr && layer > 1) {
            break;
        }
        if (weight == nullptr || layer == MAX_LAYERS || weight->shape[1] > (1 << 18)) {
            h.wrong("tensor " + name + ".weight", "is missing or too large");
        }
        check_linear(h, name, shape.projector.back(), static_cast<int>(weight->shape[1]));
        shape.projector.push_back(static_cast<int>(weight->shape[1]));
        if (shape.norms) {
            check_norm(h, layer == 0 ? "mm.1" : "mm.4", shape.projector.back());
            if (layer == 1) {
                break;
            }
        }
    }
    key(h, "projection_dim", 0, 1 << 18);
}

}  // namespace

std::string projector_name(const TowerShape & shape, size_t layer) {
    return shape.norms ? (layer == 0 ? "mm.0" : "mm.3") : format("mm.%zu", 2 * layer);
}

TowerShape check_tower(const GgufHeader & h) {
    if (h.text("general.architecture") != "clip") {
        h.wrong("general.architecture", "is " + shown(h.text("general.architecture")) + "; this file is to be a vision tower (clip)");
    }
    if (!h.flag("clip.has_vision_encoder")) {
        h.wrong("clip.has_vision_encoder", "is not true: there is no vision tower in this file");
    }
    const std::string projector = h.text("clip.projector_type");
    if (projector != "mlp") {
        fail(LLAVA_EDGE_MODEL_UNSUPPORTED, "%s: clip.projector_type is %s; this library runs mlp", h.path.c_str(), shown(projector).c_str());
    }
    for (const char * name : { "clip.use_silu", "clip.has_audio_encoder" }) {
        if (h.flag(name)) {
            fail(LLAVA_EDGE_MODEL_UNSUPPORTED, "%s: %s is true, which this library does not run", h.path.c_str(), name);
        }
    }
    check_types(h);
    TowerShape s;
    s.quick_gelu   = !h.flag("clip.use_gelu");
    s.width        = key(h, "embedding_length", 1, 1 << 14);
    s.feed_forward = key(h, "feed_forward_length", 1, 1 << 16);
    s.blocks       = key(h, "block_count", 1, 256);
    s.heads        = key(h, "attention.head_count", 1, 1024);
    s.image_size   = key(h, "image_size", 1, 4096);
    s.patch_size   = key(h, "patch_size", 1, 256);
    s.epsilon      = static_cast<float>(h.number(VISION + "attention.layer_norm_epsilon", 0, 1));
    if (s.width % s.heads != 0) {
        h.wrong(VISION + "attention.head_count", format("is %d; expected a divisor of the width %d", s.heads, s.width));
    }
    s.patches_a_side = s.image_size / s.patch_size;
    if (s.patches() < 1 || s.patches() > MAX_PATCHES) {
        h.wrong(VISION + "image_size", format("is %d with patches of %d; at most %d patches are allowed", s.image_size, s.patch_size, MAX_PATCHES));
    }
    const int64_t tokens = s.patches() + 1;
    if (s.heads * tokens * tokens > MAX_SCORES) {
        h.wrong(VISION + "attention.head_count",
                format("is %d with %d patches; attention among them would take more than %lld numbers", s.heads,
                       s.patches(), (long long) MAX_SCORES));
    }
    read_numbers(h, "image_mean", -10, s.mean);
    read_numbers(h, "image_std", 1e-6, s.std);
    read_features(h, s);

    const auto width = static_cast<uint64_t>(s.width), patch = static_cast<uint64_t>(s.patch_size);
    const auto & patches = h.check_shape("v.patch_embd.weight", { patch, patch, 3, width });
    if (patches.type > 1) {
        h.wrong("tensor v.patch_embd.weight", "is neither of F32 nor F16");
    }
    if (h.tensor("v.patch_embd.bias") != nullptr) {
        check_vector(h, "v.patch_embd.bias", s.width);
    }
    s.has_class = h.tensor("v.class_embd") != nullptr;
    if (s.has_class) {
        check_vector(h, "v.class_embd", s.width);
    }
    h.check_shape("v.position_embd.weight", { width, static_cast<uint64_t>(s.patches() + (s.has_class ? 1 : 0)), 1, 1 });
    s.has_pre_norm = h.tensor("v.pre_ln.weight") != nullptr;
    if (s.has_pre_norm) {
        check_norm(h, "v.pre_ln", s.width);
    }
    if (h.tensor("v.post_ln.weight") != nullptr) {
        fail(LLAVA_EDGE_MODEL_UNSUPPORTED, "%s: tensor v.post_ln.weight has no place here: features are taken before it", h.path.c_str());
    }
    check_blocks(h, s);
    check_projector(h, s);
    const int64_t widest = std::max({ 3 * s.width, s.feed_forward, *std::max_element(s.projector.begin(), s.projector.end()) });
    if (widest * tokens > MAX_NUMBERS) {
        h.wrong("the tower", format("is up to %lld wide with %d patches; that would take more than %lld numbers", (long long) widest,
                                    s.patches(), (long long) MAX_NUMBERS));
    }
    if (h.tensor(NEWLINE) != nullptr) {
        check_vector(h, NEWLINE, s.projector.back());
    }
    return s;
}

}  // namespace llava_edge
