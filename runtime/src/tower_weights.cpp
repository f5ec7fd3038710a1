#include "tower_weights.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "error.h"

namespace llava_edge {

namespace {

using File = std::unique_ptr<FILE, int (*)(FILE *)>;

Context make_context(size_t tensors) {
    Context context(ggml_init({ tensors * ggml_tensor_overhead(), nullptr, true }));
    if (!context) {
        throw std::bad_alloc();
    }
    return context;
}

// The device's buffer type that rearranges weights for its kernels; null if it has none.
ggml_backend_buffer_type_t repacking_type(ggml_backend_dev_t device) {
    const auto get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    ggml_backend_buffer_type_t * types = get != nullptr ? get(device) : nullptr;
    for (; types != nullptr && *types != nullptr; types++) {
        if (std::strcmp(ggml_backend_buft_name(*types), "CPU_REPACK") == 0) {
            return *types;
        }
    }
    return nullptr;
}

// Whether the device multiplies with such a weight from a buffer of this type.
bool can_repack(ggml_backend_dev_t device, ggml_backend_buffer_type_t type, ggml_type weights, int64_t in, int64_t out) {
    const Context context = make_context(4);
    ggml_tensor * w       = ggml_new_tensor_2d(context.get(), weights, in, out);
    ggml_tensor * y       = ggml_mul_mat(context.get(), w, ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, in, 512));
    const Buffer  buffer(ggml_backend_buft_alloc_buffer(type, 0));
    w->buffer        = buffer.get();
    const bool found = buffer && ggml_backend_dev_supports_op(device, y);
    w->buffer        = nullptr;
    return found;
}

Buffer allocate(ggml_context * context, ggml_backend_buffer_type_t type) {
    if (ggml_get_first_tensor(context) == nullptr) {
        return nullptr;
    }
    Buffer buffer(ggml_backend_alloc_ctx_tensors_from_buft(context, type));
    if (!buffer) {
        throw std::bad_alloc();
    }
    ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    return buffer;
}

}  // namespace

void TowerWeights::load(const GgufHeader & header, const TowerShape & shape, ggml_backend_t backend, bool repack) {
    const File file(std::fopen(header.path.c_str(), "rb"), std::fclose);
    if (!file) {
        fail(LLAVA_EDGE_IO, "can't read %s: %s", header.path.c_str(), system_text(errno).c_str());
    }
    file_              = file.get();
    header_            = &header;
    on_cpu_            = repack;
    const auto device  = ggml_backend_get_device(backend);
    const auto packing = repack ? repacking_type(device) : nullptr;
    can_repack_        = [=](ggml_type type, int64_t in, int64_t out) {
        return packing != nullptr && can_repack(device, packing, type, in, out);
    };
    plain_    = make_context(header.tensors.size() + 1);
    repacked_ = make_context(header.tensors.size() + 1);

    const auto & patches = header.tensors.at("v.patch_embd.weight");
    patch.weight         = ggml_new_tensor_2d(plain_.get(), static_cast<ggml_type>(patches.type),
                                              int64_t(3) * shape.patch_size * shape.patch_size, shape.width);
    parts_.push_back({ patch.weight, { "v.patch_embd.weight" }, patches.n_bytes });
    patch.bias  = vector("v.patch_embd.bias");
    class_token = shape.has_class ? vector("v.class_embd") : nullptr;
    positions   = ggml_new_tensor_2d(plain_.get(), GGML_TYPE_F32, shape.width, shape.patches() + (shape.has_class ? 1 : 0));
    parts_.push_back({ positions, { "v.position_embd.weight" }, header.tensors.at("v.position_embd.weight").n_bytes });
    if (shape.has_pre_norm) {
        pre_norm = norm("v.pre_ln");
    }
    for (int n = 0; n < shape.features.back(); n++) {
        const std::string name = format("v.blk.%d", n);
        blocks.push_back({ norm(name + ".ln1"), norm(name + ".ln2"),
                           merged({ name + ".attn_q", name + ".attn_k", name + ".attn_v" }), linear({ name + ".attn_out" }),
                           linear({ name + ".ffn_up" }), linear({ name + ".ffn_down" }) });
    }
    for (size_t layer = 0; layer + 1 < shape.projector.size(); layer++) {
        projector.push_back(linear({ projector_name(shape, layer) }));
        if (shape.norms) {
            projector_norms.push_back(norm(layer == 0 ? "mm.1" : "mm.4"));
        }
    }

    plain_buffer_    = allocate(plain_.get(), ggml_backend_dev_buffer_type(device));
    repacked_buffer_ = allocate(repacked_.get(), packing);
    for (const Part & part : parts_) {
        read(file.get(), part);
    }
    if (const GgufTensor * entry = header.tensor(NEWLINE)) {
        uint32_t   type  = 0;
        const auto bytes = read_bytes(file.get(), { nullptr, { NEWLINE }, entry->n_bytes }, &type);
        newline.resize(bytes.size() / sizeof(float));
        std::memcpy(newline.data(), bytes.data(), newline.size() * sizeof(float));
    }
    parts_  = {};
    file_   = nullptr;
    header_ = nullptr;
}

ggml_tensor * TowerWeights::vector(const std::string & name) {
    const GgufTensor * entry = header_->tensor(name);
    if (entry == nullptr) {
        return nullptr;
    }
    ggml_tensor * tensor = ggml_new_tensor_1d(plain_.get(), GGML_TYPE_F32, static_cast<int64_t>(entry->shape[0]));
    parts_.push_back({ tensor, { name }, entry->n_bytes });
    return tensor;
}

Norm TowerWeights::norm(const std::string & name) {
    return { vector(name + ".weight"), vector(name + ".bias") };
}

// Layers of one shape that read the same input become one: its rows are converted for the product once.
Linear TowerWeights::linear(const std::vector<std::string> & names) {
    const GgufTensor & first = header_->tensors.at(names[0] + ".weight");
    const auto         type  = static_cast<ggml_type>(first.type);
    const auto         in = static_cast<int64_t>(first.shape[0]), out = static_cast<int64_t>(first.shape[1]);
    const auto         rows  = out * static_cast<int64_t>(names.size());
    Linear             layer;
    Part               weights{ nullptr, {}, first.n_bytes }, biases{ nullptr, {}, static_cast<size_t>(out) * sizeof(float) };
    for (const std::string & name : names) {
        weights.names.push_back(name + ".weight");
        biases.names.push_back(name + ".bias");
        if (layer.bias == nullptr && header_->tensor(name + ".bias") != nullptr) {
            layer.bias = ggml_new_tensor_1d(plain_.get(), GGML_TYPE_F32, rows);
        }
    }
    if (on_cpu_ && type == GGML_TYPE_Q8_0 && Q8Linear::fits(in, rows)) {
        uint32_t found = 0;
        layer.q8       = std::make_unique<Q8Linear>(read_bytes(file_, weights, &found).data(), in, rows);
    } else {
        layer.weight = ggml_new_tensor_2d(can_repack_(type, in, rows) ? repacked_.get() : plain_.get(), type, in, rows);
        weights.to   = layer.weight;
        parts_.push_back(weights);
    }
    if (layer.bias != nullptr) {
        biases.to = layer.bias;
        parts_.push_back(biases);
    }
    return layer;
}

std::vector<Linear> TowerWeights::merged(const std::vector<std::string> & names) {
    std::vector<Linear> layers;
    bool                same = true;
    for (const std::string & name : names) {
        same = same && header_->tensors.at(name + ".weight").type == header_->tensors.at(names[0] + ".weight").type;
    }
    if (same) {
        layers.push_back(linear(names));
        return layers;
    }
    for (const std::string & name : names) {
        layers.push_back(linear({ name }));
    }
    return layers;
}

// The bytes of all its tensors, one after the other. A bias that the file lacks stays zero.
std::vector<uint8_t> TowerWeights::read_bytes(FILE * file, const Part & part, uint32_t * type) {
    std::vector<uint8_t> bytes(part.each * part.names.size());
    for (size_t i = 0; i < part.names.size(); i++) {
        const GgufTensor * entry = header_->tensor(part.names[i]);
        if (entry == nullptr) {
            continue;
        }
        *type = entry->type;
        if (fseeko(file, static_cast<off_t>(entry->offset), SEEK_SET) != 0 ||
            std::fread(bytes.data() + i * part.each, 1, part.each, file) != part.each) {
            fail(LLAVA_EDGE_IO, "can't read %s: tensor %s is cut off", header_->path.c_str(), part.names[i].c_str());
        }
    }
    return bytes;
}

// A table of positions becomes float32.
void TowerWeights::read(FILE * file, const Part & part) {
    uint32_t   type  = GGML_TYPE_F32;
    const auto bytes = read_bytes(file, part, &type);
    if (type != static_cast<uint32_t>(part.to->type)) {
        std::vector<float> values(static_cast<size_t>(ggml_nelements(part.to)));
        ggml_get_type_traits(static_cast<ggml_type>(type))->to_float(bytes.data(), values.data(), ggml_nelements(part.to));
        ggml_backend_tensor_set(part.to, values.data(), 0, ggml_nbytes(part.to));
        return;
    }
    ggml_backend_tensor_set(part.to, bytes.data(), 0, bytes.size());
}

}  // namespace llava_edge
