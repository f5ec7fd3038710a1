#include "tower.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "error.h"
#include "ggml_handles.h"
#include "tower_file.h"
#include "tower_weights.h"

namespace llava_edge {

namespace {

// Room for one block: at most 34 nodes and 16 weights. ggml's scheduler counts both, and aborts where they don't fit.
constexpr size_t NODES_A_BLOCK = 64;

template <typename F> F proc(ggml_backend_reg_t reg, const char * name) {
    return reinterpret_cast<F>(ggml_backend_reg_get_proc_address(reg, name));
}

}  // namespace

// Shapes, fastest first: W width, T tokens (patches and the class token), H heads, E = W / H.
struct Tower::Impl {
    TowerShape            shape;
    std::vector<Backend>  backends;  // the CPU last
    TowerWeights          weights;
    Sched                 sched;
    Context               context;
    ggml_cgraph *         graph  = nullptr;
    ggml_tensor *         input  = nullptr;
    ggml_tensor *         output = nullptr;
    std::vector<float>    values[3];  // of the 256 levels of a channel
    std::vector<float>    patches;
    std::mutex            mutex;
    const StopFlag *      stop;

    Impl(const std::string & path, int n_threads, bool use_gpu, const StopFlag * flag) : stop(flag) {
        const GgufHeader header = read_gguf_header(path);
        shape                   = check_tower(header);
        make_backends(n_threads, use_gpu);
        weights.load(header, shape, backends.front().get(), backends.size() == 1);
        for (int c = 0; c < 3; c++) {
            for (int level = 0; level < 256; level++) {
                values[c].push_back((static_cast<float>(level) / 255.0f - shape.mean[c]) / shape.std[c]);
            }
        }
        make_graph();
    }

    void make_backends(int n_threads, bool use_gpu) {
        if (use_gpu) {
            for (const auto type : { GGML_BACKEND_DEVICE_TYPE_GPU, GGML_BACKEND_DEVICE_TYPE_IGPU }) {
                if (backends.empty()) {
                    if (Backend gpu{ ggml_backend_init_by_type(type, nullptr) }) {
                        backends.push_back(std::move(gpu));
                    }
                }
            }
        }
        Backend cpu{ ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
        if (!cpu) {
            fail(LLAVA_EDGE_INTERNAL, "ggml has no CPU backend");
        }
        const auto reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu.get()));
        if (const auto set = proc<ggml_backend_set_n_threads_t>(reg, "ggml_backend_set_n_threads")) {
            set(cpu.get(), n_threads);
        }
        if (const auto set = proc<ggml_backend_set_abort_callback_t>(reg, "ggml_backend_set_abort_callback")) {
            set(cpu.get(), [](void * data) { return static_cast<Impl *>(data)->stop_wanted(); }, this);
        }
        backends.push_back(std::move(cpu));
    }

    bool stop_wanted() const { return stop != nullptr && stop->wanted(); }

    void make_graph() {
        const size_t nodes = NODES_A_BLOCK * static_cast<size_t>(shape.blocks + 4);
        context.reset(ggml_init({ nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false), nullptr, true }));
        if (!context) {
            throw std::bad_alloc();
        }
        graph = ggml_new_graph_custom(context.get(), nodes, false);
        output = project(features(embed()));
        ggml_set_output(output);
        ggml_build_forward_expand(graph, output);

        std::vector<ggml_backend_t> list;
        for (const Backend & backend : backends) {
            list.push_back(backend.get());
        }
        sched.reset(ggml_backend_sched_new(list.data(), nullptr, static_cast<int>(list.size()), nodes, false, false));
        if (!sched || !ggml_backend_sched_alloc_graph(sched.get(), graph)) {
            throw std::bad_alloc();
        }
    }

    ggml_context * g() const { return context.get(); }

    ggml_tensor * linear(const Linear & l, ggml_tensor * x, Activation activation = Activation::None) const {
        if (l.q8) {
            return l.q8->multiply(g(), x, l.bias, activation);
        }
        if (activation != Activation::None) {
            x = activation == Activation::QuickGelu ? ggml_gelu_quick(g(), x) : ggml_gelu(g(), x);
        }
        ggml_tensor * y = ggml_mul_mat(g(), l.weight, x);
        return l.bias != nullptr ? ggml_add(g(), y, l.bias) : y;
    }

    ggml_tensor * norm(const Norm & n, ggml_tensor * x) const {
        return ggml_add(g(), ggml_mul(g(), ggml_norm(g(), x, shape.epsilon), n.weight), n.bias);
    }

    // Patches [3 * size * size, P] to the input of the first block [W, T].
    ggml_tensor * embed() {
        input = ggml_new_tensor_2d(g(), GGML_TYPE_F32, weights.patch.weight->ne[0], shape.patches());
        ggml_set_input(input);
        ggml_tensor * x = linear(weights.patch, input);
        if (shape.has_class) {
            x = ggml_concat(g(), weights.class_token, x, 1);  // first: the positions are numbered so
        }
        x = ggml_add(g(), x, weights.positions);
        return shape.has_pre_norm ? norm(weights.pre_norm, x) : x;
    }

    ggml_tensor * attention(const Block & b, ggml_tensor * x) const {
        const int64_t width = shape.width, heads = shape.heads, each = width / heads, tokens = x->ne[1];
        std::vector<ggml_tensor *> made;  // [3W, T], or [W, T] three times
        for (const Linear & l : b.qkv) {
            made.push_back(linear(l, x));
        }
        const auto part = [&](int64_t n) {
            ggml_tensor * from = made.size() == 1 ? made[0] : made[static_cast<size_t>(n)];
            return ggml_view_3d(g(), from, each, heads, tokens, static_cast<size_t>(each) * sizeof(float), from->nb[1],
                                made.size() == 1 ? static_cast<size_t>(n * width) * sizeof(float) : 0);
        };
        const auto by_head = [&](int64_t n) { return ggml_permute(g(), part(n), 0, 2, 1, 3); };  // [E, T, H]
        ggml_tensor * mixed = ggml_flash_attn_ext(g(), by_head(0), by_head(1), by_head(2), nullptr,
                                                  1.0f / std::sqrt(static_cast<float>(each)), 0.0f, 0.0f);  // [E, H, T]
        return linear(b.out, ggml_reshape_2d(g(), mixed, width, tokens));
    }

    ggml_tensor * block(const Block & b, ggml_tensor * x) const {
        x = ggml_add(g(), x, attention(b, norm(b.norm1, x)));
        ggml_tensor * wide = linear(b.up, norm(b.norm2, x));
        return ggml_add(g(), x, linear(b.down, wide, shape.quick_gelu ? Activation::QuickGelu : Activation::Gelu));
    }

    // The hidden states that are read, side by side, without the class token: [features * W, P].
    ggml_tensor * features(ggml_tensor * x) const {
        ggml_tensor * found = nullptr;
        for (int layer = 0;; layer++) {
            if (std::binary_search(shape.features.begin(), shape.features.end(), layer)) {
                found = found == nullptr ? x : ggml_concat(g(), found, x, 0);
            }
            if (layer == shape.features.back()) {
                break;
            }
            x = block(weights.blocks[static_cast<size_t>(layer)], x);
        }
        return shape.has_class ? ggml_view_2d(g(), found, found->ne[0], shape.patches(), found->nb[1], found->nb[1]) : found;
    }

    ggml_tensor * project(ggml_tensor * x) const {
        for (size_t i = 0; i < weights.projector.size(); i++) {
            if (i > 0) {
                x = ggml_gelu_erf(g(), x);
            }
            x = linear(weights.projector[i], x);
            if (shape.norms) {
                x = norm(weights.projector_norms[i], x);
            }
        }
        return x;
    }

    // Channel by channel and row by row within a patch, as the weights are.
    void read_pixels(const uint8_t * pixels, size_t stride) {
        const auto size = static_cast<size_t>(shape.patch_size), side = static_cast<size_t>(shape.patches_a_side);
        patches.resize(static_cast<size_t>(ggml_nelements(input)));
        float * to = patches.data();
        for (size_t patch = 0; patch < side * side; patch++) {
            const uint8_t * corner = pixels + patch / side * size * stride + patch % side * size * 3;
            for (size_t c = 0; c < 3; c++) {
                for (size_t y = 0; y < size; y++) {
                    for (size_t x = 0; x < size; x++) {
                        *to++ = values[c][corner[y * stride + x * 3 + c]];
                    }
                }
            }
        }
    }

    std::vector<float> encode(const uint8_t * pixels, size_t stride) {
        const std::lock_guard<std::mutex> lock(mutex);
        read_pixels(pixels, stride);
        ggml_backend_tensor_set(input, patches.data(), 0, ggml_nbytes(input));
        const ggml_status status = ggml_backend_sched_graph_compute(sched.get(), graph);
        if (status == GGML_STATUS_ABORTED) {
            fail(LLAVA_EDGE_STOPPED, "the picture's evaluation was stopped");
        }
        if (status != GGML_STATUS_SUCCESS) {
            fail(LLAVA_EDGE_ENGINE, "ggml can't evaluate the vision tower: status %d", static_cast<int>(status));
        }
        std::vector<float> found(static_cast<size_t>(ggml_nelements(output)));
        ggml_backend_tensor_get(output, found.data(), 0, ggml_nbytes(output));
        if (!std::all_of(found.begin(), found.end(), [](float v) { return std::isfinite(v); })) {
            fail(LLAVA_EDGE_MODEL_INVALID, "the vision tower gave values that are not numbers: its file is damaged");
        }
        return found;
    }
};

Tower::Tower(const std::string & path, int n_threads, bool use_gpu, const StopFlag * stop)
    : impl_(std::make_unique<Impl>(path, n_threads, use_gpu, stop)) {}

Tower::~Tower() = default;

int Tower::image_size() const {
    return impl_->shape.image_size;
}

int Tower::n_tokens() const {
    return impl_->shape.patches();
}

int Tower::n_embd() const {
    return impl_->shape.projector.back();
}

const std::vector<float> & Tower::newline() const {
    return impl_->weights.newline;
}

std::vector<float> Tower::encode(const uint8_t * pixels, size_t stride) {
    return impl_->encode(pixels, stride);
}

int pooled_cell(int rows, int columns, int count) {
    for (int cell = 1; cell <= std::min(rows, columns); cell++) {
        if (rows % cell == 0 && columns % cell == 0 && rows / cell * (columns / cell) == count) {
            return cell;
        }
    }
    return 0;
}

std::vector<float> pool(const std::vector<float> & embeddings, int rows, int columns, int count) {
    if (count == rows * columns) {
        return embeddings;
    }
    const int          cell = pooled_cell(rows, columns, count);
    const size_t       width = embeddings.size() / (size_t(rows) * size_t(columns));
    std::vector<float> pooled(size_t(count) * width, 0.0f);
    for (int row = 0; row < rows; row++) {
        for (int column = 0; column < columns; column++) {
            const float * from = embeddings.data() + (size_t(row) * size_t(columns) + size_t(column)) * width;
            float *       to   = pooled.data() + (size_t(row / cell) * size_t(columns / cell) + size_t(column / cell)) * width;
            for (size_t i = 0; i < width; i++) {
                to[i] += from[i];
            }
        }
    }
    for (float & value : pooled) {
        value /= static_cast<float>(cell * cell);
    }
    return pooled;
}

double probe_cosine(const Probe & probe, const std::vector<float> & embeddings, int width) {
    const size_t w = static_cast<size_t>(width);
    if (probe.embeddings.size() != probe.token_rows.size() * w) {
        return 0;
    }
    double sum = 0;
    for (size_t i = 0; i < probe.token_rows.size(); i++) {
        const auto row = static_cast<size_t>(probe.token_rows[i]);
        if (row >= embeddings.size() / w) {
            return 0;
        }
        double both = 0, have = 0, want = 0;
        for (size_t k = 0; k < w; k++) {
            const double a = embeddings[row * w + k], b = probe.embeddings[i * w + k];
            both += a * b;
            have += a * a;
            want += b * b;
        }
        sum += have > 0 && want > 0 && std::isfinite(want) ? both / std::sqrt(have * want) : 0;
    }
    return sum / static_cast<double>(probe.token_rows.size());
}

}  // namespace llava_edge
